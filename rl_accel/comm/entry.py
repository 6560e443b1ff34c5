"""`attach`: one entry for all hosts."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist

from rl_accel.comm.config import SDP4BitConfig
from rl_accel.comm.handle import CommHandle
from rl_accel.errors import CommError


def attach(
    engine_or_module: Any, config: SDP4BitConfig | None = None, optimizer: torch.optim.Optimizer | None = None
) -> CommHandle:
    """Quantize what an engine's ranks send each other, from the next backward pass on.

    Args:
        engine_or_module: a `DeepSpeedEngine` (ZeRO stage 1, 2 or 3, or its BF16_Optimizer), or the root module of
            FSDP2 (`fully_shard`). Call it on all ranks, before the first backward pass.
        config: None: the defaults.
        optimizer: FSDP2: the optimizer of the sharded parameters, whose steps say when weights changed.

    Returns:
        the handle: `stats()`, `state_dict()`, `check_replicas()`, `detach()`.

    Raises:
        CommError: on every rank, for an engine that cannot be served or ranks that disagree; nothing is changed then.
        VersionError: for a host whose symbols are not those that were tested.
    """
    config = config or SDP4BitConfig()
    if not dist.is_initialized():
        raise CommError("attach needs torch.distributed; initialize the process group (or the engine) first")
    engines = sys.modules.get("deepspeed.runtime.engine")
    if engines is not None and isinstance(engine_or_module, engines.DeepSpeedEngine):
        from rl_accel.comm.hosts.deepspeed import attach as deepspeed

        return deepspeed.attach(engine_or_module, config)
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(engine_or_module, fsdp.FSDPModule):
        from rl_accel.comm.hosts import fsdp2

        return fsdp2.attach(engine_or_module, config, optimizer)
    raise CommError(
        f"attach serves DeepSpeed engines and modules of FSDP2 (fully_shard); got {type(engine_or_module).__name__}"
    )


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """`deepspeed.initialize`, argument by argument, for a configuration with a block `sdp4bit`; see
    `rl_accel.comm.hosts.deepspeed.attach`."""
    from rl_accel.comm.hosts.deepspeed import attach as deepspeed

    return deepspeed.initialize(*args, **kwargs)
