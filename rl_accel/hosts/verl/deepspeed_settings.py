"""Point a verl configuration with `strategy=deepspeed` at the engine's settings class."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf, open_dict

from rl_accel.config import CommConfig, DeepSpeedConfig
from rl_accel.hosts.verl.deepspeed_checks import ROLES, roles_in_use

CONFIG_CLASS = "rl_accel.hosts.verl.deepspeed_config.DeepSpeedEngineConfig"


def apply(config: DictConfig, settings: DeepSpeedConfig, comm: CommConfig) -> None:
    """Name our settings class in every role that asks for the engine, in place. `comm` is for roles that train."""
    with open_dict(config):
        for role in roles_in_use(config):
            node = OmegaConf.select(config, f"{role}.{ROLES[role]}")
            node._target_ = CONFIG_CLASS
            node.strategy = "deepspeed"
            node.zero_stage = settings.zero_stage
            node.ds_config = dict(settings.ds_config)
            node.comm = {} if role == "actor_rollout_ref.ref" else comm.settings()
