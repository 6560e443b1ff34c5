"""What must hold before a DeepSpeed engine is touched: version, optimizer class, host symbols as they were read, no
features that quantized communication does not cover, and agreement of all ranks.

Host symbols: those of `HOST_SYMBOLS`, and the settings of `DeepSpeedEngine` and `zero_config` read below.
"""

from __future__ import annotations

import importlib
import inspect
import types
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from rl_accel.comm.config import SDP4BitConfig
from rl_accel.comm.hosts.deepspeed import weights
from rl_accel.errors import CommError, VersionError
from rl_accel.hosts import versions
from rl_accel.kernels.codec import api as codec

STAGE12 = "deepspeed.runtime.zero.stage_1_and_2"
STAGE3 = "deepspeed.runtime.zero.stage3"
BF16 = "deepspeed.runtime.bf16_optimizer"

HOST_SYMBOLS: dict[str, dict[str, tuple[str, ...]]] = {
    "DeepSpeedZeroOptimizer": {
        f"{STAGE12}:DeepSpeedZeroOptimizer.step": ("self", "closure"),
        f"{STAGE12}:DeepSpeedZeroOptimizer.allreduce_and_scatter": (
            "self",
            "bucket",
            "communication_data_type",
            "numel_per_bucket",
            "log",
            "divide",
            "process_group",
        ),
        f"{STAGE12}:DeepSpeedZeroOptimizer.reduce_ipg_grads": ("self", "comm_dtype"),
        f"{STAGE12}:DeepSpeedZeroOptimizer._add_to_grad_partition_buffer": ("output", "source"),
        f"{STAGE12}:DeepSpeedZeroOptimizer.get_gradient_for_reduction": ("self", "param"),
        f"{STAGE12}:all_gather_dp_groups": (
            "groups_flat",
            "partitioned_param_groups",
            "dp_process_group",
            "start_alignment_factor",
            "allgather_bucket_size",
        ),
    },
    "BF16_Optimizer": {
        f"{BF16}:BF16_Optimizer.step": ("self", "closure"),
        f"{BF16}:all_gather_dp_groups": (
            "groups_flat",
            "partitioned_param_groups",
            "dp_process_group",
            "start_alignment_factor",
            "allgather_bucket_size",
        ),
        "deepspeed.runtime.engine:DeepSpeedEngine.allreduce_bucket": ("self", "bucket", "dp_group", "dp_world_size"),
    },
    "DeepSpeedZeroOptimizer_Stage3": {
        f"{STAGE3}:DeepSpeedZeroOptimizer_Stage3.step": ("self", "closure"),
        f"{STAGE3}:DeepSpeedZeroOptimizer_Stage3._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads": (
            "self",
            "params_to_reduce",
            "communication_data_type",
        ),
        f"{STAGE3}:reduce_scatter_coalesced": ("tensors", "group"),
    },
}
"""Optimizer class -> the functions that its glue replaces or calls, with their parameters."""


def check(engine: Any, config: SDP4BitConfig, group: dist.ProcessGroup) -> dict[str, Any]:
    """Check one rank's engine.

    Returns:
        what must be equal on all ranks.

    Raises:
        CommError: for an engine that cannot be served.
        NotLiveError: if the codec does not load.
        VersionError: for a DeepSpeed that was not tested, or whose symbols changed.
    """
    versions.check_deepspeed()
    name = type(engine.optimizer).__name__
    if name not in HOST_SYMBOLS or type(engine.optimizer).__module__ not in (STAGE12, STAGE3, BF16):
        raise CommError(
            f"4-bit communication serves ZeRO stages 1 to 3 ({', '.join(HOST_SYMBOLS)}); this engine's optimizer is "
            f"{name}. Set zero_optimization.stage in the DeepSpeed configuration"
        )
    moved = changed_host_symbols(name)
    if moved:
        raise VersionError(
            f"the installed DeepSpeed has changed where 4-bit communication joins it: {'; '.join(moved)}"
        )
    unsupported = _unsupported(engine, config, group)
    if unsupported:
        raise CommError(f"4-bit communication does not cover {unsupported}")
    backend = codec.load_backend(config.backend, engine.device).__name__
    return {
        "config": asdict(config),
        "backend": backend,
        "optimizer": name,
        "deepspeed": versions.installed("deepspeed"),
    }


def changed_host_symbols(optimizer: str) -> list[str]:
    """Return what differs from `HOST_SYMBOLS` in the installed DeepSpeed, in words; empty where all is in place."""
    moved = []
    for path, expected in HOST_SYMBOLS[optimizer].items():
        module_name, _, attribute = path.partition(":")
        target: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            target = getattr(target, part, None)
        if target is None:
            moved.append(f"{path} is gone")
            continue
        parameters = tuple(inspect.signature(undecorated(target)).parameters)
        if parameters != expected:
            moved.append(f"{path} takes ({', '.join(parameters)}) instead of ({', '.join(expected)})")
    return moved


def undecorated(function: Any) -> Any:
    """DeepSpeed's `instrument_w_nvtx` hides the signature; what it wraps is its nonlocal `func`."""
    function = inspect.unwrap(function)
    if isinstance(function, types.FunctionType) and function.__closure__:
        inner = inspect.getclosurevars(function).nonlocals.get("func")
        if callable(inner):
            return undecorated(inner)
    return function


def _unsupported(engine: Any, config: SDP4BitConfig, group: dist.ProcessGroup) -> str | None:
    from deepspeed.runtime.pipe.engine import PipelineEngine

    optimizer, zero = engine.optimizer, engine._config.zero_config
    sharded = type(optimizer).__name__ == "DeepSpeedZeroOptimizer_Stage3"
    stage12 = type(optimizer).__name__ == "DeepSpeedZeroOptimizer"
    quantized_zeropp = [
        name
        for name in ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")
        if getattr(zero, name)
    ]
    offload = [name for name in ("offload_optimizer", "offload_param") if _offloads(getattr(zero, name))]
    reasons = [
        (isinstance(engine, PipelineEngine), "pipeline parallelism"),
        (engine.has_moe_layers, "mixture-of-experts layers of DeepSpeed (expert groups reduce apart)"),
        (bool(offload), f"{' and '.join(offload)}: gradients leave the device before they are reduced"),
        (bool(quantized_zeropp), f"ZeRO++ beside it: switch off {', '.join(quantized_zeropp)}"),
        (zero.zero_hpz_partition_size > 1, "ZeRO++ hierarchical partitions: set zero_hpz_partition_size to 1"),
        (getattr(zero, "zenflow", None) is not None, "ZenFlow"),
        (engine.sequence_parallel_size > 1, "sequence parallelism"),
        (
            "Muon" in type(optimizer.optimizer).__name__,
            "the Muon optimizer, which needs whole matrices on several ranks",
        ),
        (
            config.gradients and stage12 and not optimizer.reduce_scatter,
            "zero_optimization.reduce_scatter=false: set it to true",
        ),
        (
            config.gradients and stage12 and not optimizer.use_multi_rank_bucket_allreduce,
            "zero_optimization.use_multi_rank_bucket_allreduce=false: set it to true",
        ),
        (
            config.gradients and stage12 and not optimizer.contiguous_gradients,
            "zero_optimization.contiguous_gradients=false: set it to true",
        ),
        (
            config.gradients and sharded and not optimizer.reduce_scatter,
            "zero_optimization.reduce_scatter=false: set it to true",
        ),
        (
            not sharded and not weights.groups_agree(optimizer, group),
            "parameter groups that are sharded over different ranks",
        ),
        (getattr(optimizer, "sdp4bit_handle", None) is not None, "an engine twice: detach() the first handle"),
    ]
    return next((reason for holds, reason in reasons if holds), None)


def _offloads(offload: Any) -> bool:
    device = getattr(offload, "device", None)
    return device is not None and str(getattr(device, "value", device)) != "none"
