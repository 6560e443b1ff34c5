"""4-bit communication before a run starts."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from rl_accel.errors import ConfigError
from rl_accel.feature import Driver
from rl_accel.hosts.verl.training_roles import FORWARD_ONLY, NODES, node, with_strategy


class CommDriver(Driver):
    """Serves actor and critic where they train with FSDP2 or DeepSpeed."""

    def check(self, config: DictConfig) -> None:
        if self.settings.enabled:
            _check(config, self.settings, self.accel.settings["deepspeed"].zero_stage)

    def rank_settings(self, config: DictConfig, role: str) -> dict[str, Any]:
        served = [*with_strategy(config, "fsdp2"), *with_strategy(config, "deepspeed")]
        if role not in served or role == FORWARD_ONLY:
            return {}
        settings = self.settings.settings()
        if config.actor_rollout_ref.model.get("lora_rank", 0):
            settings["sharded_weights"] = False  # adapters are sent to the rollout engines as they are
        return settings

    def summary(self, config: DictConfig) -> str:
        return "4-bit communication (lossy)" if self.settings.enabled else ""


def _check(config: DictConfig, comm: Any, zero_stage: int) -> None:
    """Raise ConfigError for 4-bit communication that this configuration could not carry."""
    actor = config.actor_rollout_ref.actor.strategy
    if actor not in ("deepspeed", "fsdp2"):
        raise ConfigError(
            f"rl_accel.comm.enable=true serves actor_rollout_ref.actor.strategy=fsdp2 and deepspeed (trainer=deepspeed "
            f"with a recipe); it is {actor}"
        )
    ranks = config.trainer.n_gpus_per_node * config.trainer.nnodes
    if comm.local_size is not None and ranks % comm.local_size:
        raise ConfigError(f"rl_accel.comm.local_size={comm.local_size} does not divide the {ranks} ranks")
    if with_strategy(config, "deepspeed") and zero_stage == 3:
        _check_shards(config, comm, "ZeRO 3", "or use rl_accel.deepspeed.zero_stage=2")
    for role in with_strategy(config, "fsdp2"):
        if role == FORWARD_ONLY:
            continue
        _check_shards(config, comm, "FSDP2", "or use rl_accel.deepspeed.zero_stage=2 with trainer=deepspeed")
        settings = node(config, role)
        if settings.get("fsdp_size", -1) not in (-1, ranks):
            raise ConfigError(
                f"{role}.{NODES[role]}.fsdp_size={settings.fsdp_size}: 4-bit communication shards over all ranks; "
                "leave it at -1"
            )
        if settings.get("offload_policy", False):
            raise ConfigError(f"{role}.{NODES[role]}.offload_policy: 4-bit communication does not cover CPU offload")


def _check_shards(config: DictConfig, comm: Any, host: str, instead: str) -> None:
    """Refuse what needs 4-bit weights, where ranks hold shards and nothing of other nodes' shards."""
    place = comm.local_size or config.trainer.n_gpus_per_node
    wanted = place > 1 if comm.sharded_weights is None else comm.sharded_weights
    if comm.weights and wanted and config.trainer.n_gpus_per_node * config.trainer.nnodes > place:
        return
    for refused, key in ((not comm.gradients, "gradients=false"), (comm.check_every > 0, "check_every")):
        if refused:
            raise ConfigError(
                f"rl_accel.comm.{key} needs 4-bit weights, which {host} has on several nodes with "
                f"rl_accel.comm.sharded_weights=true; {instead}"
            )
