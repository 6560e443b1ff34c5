"""Settings of the DeepSpeed training engine, `rl_accel.deepspeed.*`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rl_accel.errors import ConfigError

OWNED_DS_KEYS = {
    "train_batch_size": "data.train_batch_size and actor.ppo_mini_batch_size",
    "train_micro_batch_size_per_gpu": "actor.ppo_micro_batch_size_per_gpu",
    "gradient_accumulation_steps": "actor.ppo_mini_batch_size and ppo_micro_batch_size_per_gpu",
    "managed_gradient_accumulation": "actor.ppo_mini_batch_size and ppo_micro_batch_size_per_gpu",
    "gradient_clipping": "actor.optim.clip_grad",
    "optimizer": "actor.optim",
    "scheduler": "actor.optim.lr_scheduler_type",
    "bf16": "actor.fsdp_config.dtype",
    "fp16": "actor.fsdp_config.dtype",
    "torch_autocast": "actor.fsdp_config.dtype",
    "zero_optimization.stage": "rl_accel.deepspeed.zero_stage",
    "tensor_parallel": "nothing: the engine shards by ZeRO only",
    "sequence_parallel_size": "nothing: the engine shards by ZeRO only",
}
"""Keys of a DeepSpeed configuration that follow from verl's settings -> where to set them."""


@dataclass(frozen=True)
class DeepSpeedConfig:
    """The training engine of `strategy=deepspeed` (`rl_accel.deepspeed.*`)."""

    zero_stage: int = 2
    """1: optimizer state is sharded over ranks, 2: and gradients, 3: and weights."""
    ds_config: dict = field(default_factory=dict)
    """DeepSpeed configuration of your own, merged last into the one that the engine makes."""

    def __post_init__(self) -> None:
        if self.zero_stage not in (1, 2, 3):
            raise ConfigError(f"rl_accel.deepspeed.zero_stage must be 1, 2 or 3; got {self.zero_stage}")
        for key, instead in OWNED_DS_KEYS.items():
            group, _, inner = key.partition(".")
            nested = self.ds_config.get(group)
            if group in self.ds_config and (not inner or (isinstance(nested, Mapping) and inner in nested)):
                raise ConfigError(f"rl_accel.deepspeed.ds_config.{key} is set by the engine; use {instead}")

    @property
    def enabled(self) -> bool:
        """Whether the user gave settings; `strategy=deepspeed` is what switches the engine on."""
        return self != DeepSpeedConfig()
