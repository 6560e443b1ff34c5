"""verl's training roles in a configuration, and what features give to their ranks. Imports no host."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

NODES = {"actor_rollout_ref.actor": "fsdp_config", "actor_rollout_ref.ref": "fsdp_config", "critic": "fsdp"}
"""Role -> its node of engine settings. verl names these nodes by the engine that it brings."""
FORWARD_ONLY = "actor_rollout_ref.ref"
FIELD = "rl_accel"
"""Of such a node: feature -> settings of its `Rank`."""
FSDP2_CLASS = "rl_accel.hosts.verl.fsdp2_ranks.FSDP2Config"


def with_strategy(config: DictConfig, strategy: str) -> list[str]:
    """Return the roles that ask for a training engine."""
    return [role for role in NODES if OmegaConf.select(config, f"{role}.strategy") == strategy]


def node(config: DictConfig, role: str) -> DictConfig:
    """Return the engine settings of a role."""
    return OmegaConf.select(config, f"{role}.{NODES[role]}")


def give(config: DictConfig, role: str, feature: str, settings: dict[str, Any]) -> None:
    """Hand settings to the ranks of a role, in place."""
    target = node(config, role)
    if OmegaConf.select(config, f"{role}.strategy") == "fsdp2":
        target._target_, target.strategy = FSDP2_CLASS, "fsdp2"
    target[FIELD] = {**(target.get(FIELD) or {}), feature: settings}
