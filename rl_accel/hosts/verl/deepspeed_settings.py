"""Point a verl configuration at the settings classes of engines: of ours, `strategy=deepspeed`, and of verl's FSDP2
engine where it gets 4-bit communication."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf, open_dict

from rl_accel.config import CommConfig, DeepSpeedConfig
from rl_accel.hosts.verl.deepspeed_checks import ROLES, roles_in_use

FSDP2_CLASS = "rl_accel.hosts.verl.fsdp2_comm.FSDP2CommConfig"
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
        for role in roles_in_use(config, "fsdp2") if comm.enable else []:
            if role != "actor_rollout_ref.ref":
                node = OmegaConf.select(config, f"{role}.{ROLES[role]}")
                node._target_ = FSDP2_CLASS
                node.strategy = "fsdp2"
                node.comm = comm.settings()
