"""Settings of the DeepSpeed training engine, and the DeepSpeed configuration made of them.

verl builds `DeepSpeedEngineConfig` where the node `fsdp_config` (actor, reference) or `fsdp` (critic) names it as its
`_target_`; `driver.py` writes that. Source: ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from verl.workers.config import FSDPEngineConfig

from rl_accel.errors import ConfigError

MAX_BUCKET_NUMEL = 500_000_000
"""DeepSpeed's own default bucket, in elements. A smaller model gets one bucket of its own size."""

BUCKET_MULTIPLE = 1024
"""DeepSpeed asserts that buckets divide into aligned parts."""

DTYPES = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}


@dataclass
class DeepSpeedEngineConfig(FSDPEngineConfig):
    """verl's FSDP settings, of which sharding and wrapping are not read, and three of ours."""

    strategy: str = "deepspeed"
    zero_stage: int = 2
    """1: optimizer state is sharded, 2: and gradients, 3: and weights."""
    ds_config: dict[str, Any] = field(default_factory=dict)
    """DeepSpeed configuration, merged last into the one made here."""
    rl_accel: dict[str, Any] = field(default_factory=dict)
    """Feature -> settings of its `Rank` (`hosts/verl/ranks.py`)."""

    def __post_init__(self):
        return None  # the parent's asserts the FSDP strategies


def param_dtype(config: FSDPEngineConfig) -> torch.dtype:
    """Return the dtype of the weights that compute: `mixed_precision.param_dtype`, else `dtype`.

    Raises:
        ConfigError: for a dtype other than float32 and bfloat16.
    """
    mixed = config.mixed_precision or {}
    name = str(mixed.get("param_dtype") or config.dtype)
    if name not in DTYPES:
        raise ConfigError(f"strategy=deepspeed trains in bfloat16 or float32; got {name}")
    return DTYPES[name]


def zero_stage(config: FSDPEngineConfig) -> int:
    """Return the ZeRO stage; verl's own configuration class, which a command without our block uses, means 2."""
    return getattr(config, "zero_stage", 2)


def make_ds_config(config: FSDPEngineConfig, numel: int, device_type: str, clip_grad: float | None) -> dict[str, Any]:
    """Return DeepSpeed's configuration.

    Gradients are averaged over ranks and never divided by the number of micro-batches (`gradient_accumulation_steps`
    stays 1; verl's losses are already normalized by the tokens of the whole batch). As in verl's FSDP engine they are
    reduced and added up in float32 by default. The exception is bfloat16 at stage 1: float32 accumulation would select
    DeepSpeed's `BF16_Optimizer`, so micro-batches are added in bfloat16 there.

    Args:
        numel: number of parameters of the model.
        clip_grad: largest gradient norm; None for an engine without an optimizer.
    """
    stage, dtype = zero_stage(config), param_dtype(config)
    bucket = min(-(-numel // BUCKET_MULTIPLE) * BUCKET_MULTIPLE, MAX_BUCKET_NUMEL)
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "contiguous_gradients": True,
            "overlap_comm": device_type != "cpu",
        },
    }
    if clip_grad is not None:
        made["gradient_clipping"] = float(clip_grad)
    if dtype == torch.bfloat16:
        made["bf16"] = {"enabled": True, "check_grad_overflow": True}
        reduce_dtype = str((config.mixed_precision or {}).get("reduce_dtype") or "fp32")
        made["communication_data_type"] = "bf16" if DTYPES.get(reduce_dtype) == torch.bfloat16 else "fp32"
        if stage > 1:
            made["data_types"] = {"grad_accum_dtype": "fp32"}
    if config.forward_only and config.param_offload:
        made["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": device_type != "cpu"}
    return merge(made, _plain(getattr(config, "ds_config", {})))


def merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``extra`` on top, group by group."""
    merged = dict(base)
    for key, value in extra.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if nested else value
    return merged


def _plain(values: Any) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(values, resolve=True) if isinstance(values, DictConfig) else dict(values)
    return plain
