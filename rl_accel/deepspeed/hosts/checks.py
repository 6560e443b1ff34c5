"""What `strategy=deepspeed` cannot do, refused before anything starts; each error names what to use instead.

The driver checks the whole configuration (`check`), and every engine what it was given (`check_engine`), for commands
that reach verl's workers another way. Both kinds of configuration answer `.get(key, default)`.
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from rl_accel.deepspeed.config import DeepSpeedConfig
from rl_accel.errors import ConfigError
from rl_accel.hosts import versions
from rl_accel.hosts.verl.training_roles import NODES, with_strategy

STRATEGY = "deepspeed"
OPTIMIZERS = ("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "SGD", "RMSprop", "Adagrad")
"""Of `torch.optim`, those that update each element by itself: ZeRO hands an optimizer flat pieces of many weights."""
DTYPES = ("fp32", "float32", "bf16", "bfloat16")


def check(config: DictConfig, settings: DeepSpeedConfig, asked_for: bool) -> None:
    """Raise ConfigError for a configuration that the engine cannot train.

    Args:
        asked_for: the user gave `rl_accel.deepspeed` settings.
    """
    roles = with_strategy(config, STRATEGY)
    if asked_for and not roles:
        raise ConfigError(
            "rl_accel.deepspeed is set and no role trains with DeepSpeed: set "
            "actor_rollout_ref.actor.strategy=deepspeed, or take trainer=deepspeed with a recipe"
        )
    if not roles:
        return
    versions.check_deepspeed()
    for role in roles:
        node = OmegaConf.select(config, role)
        model = config.critic.model if role == "critic" else config.actor_rollout_ref.model
        engine = node[NODES[role]]
        _check_parallelism(role, node, engine, config.trainer.n_gpus_per_node * config.trainer.nnodes)
        _check_role(role, model, engine, node.get("optim"), node.get("checkpoint"), settings.zero_stage)
        if (node.get("qat") or {}).get("enable", False):
            raise ConfigError(f"{role}.qat: quantization-aware training needs strategy=fsdp2")
        if settings.zero_stage == 3 and engine.get("optimizer_offload") and config.trainer.device != "cpu":
            raise ConfigError(
                f"{role}.{NODES[role]}.optimizer_offload: DeepSpeed moves optimizer states between phases at ZeRO 1 "
                "and 2 only; use rl_accel.deepspeed.zero_stage=2, or keep them in host memory with "
                "rl_accel.deepspeed.ds_config.zero_optimization.offload_optimizer.device=cpu"
            )


def check_engine(model: Any, engine: Any, optim: Any, checkpoint: Any) -> None:
    """Raise ConfigError for an engine that cannot be built from these settings of verl."""
    if engine.get("ulysses_sequence_parallel_size", 1) > 1:
        raise ConfigError("strategy=deepspeed has no sequence parallelism; use strategy=fsdp2")
    _check_role("engine", model, engine, optim, checkpoint, engine.get("zero_stage", 2))


def _check_parallelism(role: str, node: DictConfig, engine: DictConfig, devices: int) -> None:
    for place in (node, engine):
        if place.get("ulysses_sequence_parallel_size", 1) > 1:
            raise ConfigError(
                f"{role}.ulysses_sequence_parallel_size > 1: strategy=deepspeed has no sequence parallelism; use 1 "
                "or strategy=fsdp2"
            )
    if engine.get("fsdp_size", -1) not in (-1, devices):
        raise ConfigError(
            f"{role}.{NODES[role]}.fsdp_size={engine.fsdp_size}: ZeRO shards over all ranks; leave it at -1, or set "
            "zero_hpz_partition_size in rl_accel.deepspeed.ds_config.zero_optimization"
        )


def _check_role(role: str, model: Any, engine: Any, optim: Any, checkpoint: Any, stage: int) -> None:
    if model.get("lora_rank", 0) or model.get("lora_adapter_path"):
        raise ConfigError(f"{role}: strategy=deepspeed trains whole models; LoRA needs strategy=fsdp2")
    if model.get("enable_activation_offload", False):
        raise ConfigError(f"{role}: model.enable_activation_offload needs strategy=fsdp2")
    if (engine.get("qat") or {}).get("enable", False):
        raise ConfigError(f"{role}: quantization-aware training needs strategy=fsdp2")
    if engine.get("offload_policy", False):
        raise ConfigError(
            f"{role}: offload_policy is FSDP2's; use param_offload and optimizer_offload, or "
            "rl_accel.deepspeed.ds_config.zero_optimization.offload_optimizer"
        )
    dtype = (engine.get("mixed_precision") or {}).get("param_dtype") or engine.get("dtype", "bfloat16")
    if str(dtype) not in DTYPES:
        raise ConfigError(f"{role}: strategy=deepspeed trains in bfloat16 or float32; got {dtype}")
    if stage not in (1, 2, 3):
        raise ConfigError(f"{role}: zero_stage must be 1, 2 or 3; got {stage}")
    if engine.get("forward_only", False):
        return
    if optim is not None and (
        optim.get("optimizer_impl", "torch.optim") != "torch.optim" or optim.get("optimizer", "AdamW") not in OPTIMIZERS
    ):
        raise ConfigError(
            f"{role}.optim: ZeRO updates flat pieces of many weights, which needs an element-wise optimizer: "
            f"torch.optim.{{{', '.join(OPTIMIZERS)}}}; got {optim.get('optimizer_impl')}.{optim.get('optimizer')}"
        )
    for key in ("save_contents", "load_contents"):
        contents = (checkpoint or {}).get(key) or ["model", "optimizer"]
        if ("model" in contents) != ("optimizer" in contents):
            raise ConfigError(
                f"{role}.checkpoint.{key}={list(contents)}: DeepSpeed writes and reads model and optimizer together; "
                "name both or none. hf_model saves weights alone"
            )
