"""Attach 4-bit communication to a DeepSpeed engine, and the form with a block in the DeepSpeed configuration."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rl_accel.comm import codec, topology
from rl_accel.comm.config import SDP4BitConfig
from rl_accel.comm.handle import Handle
from rl_accel.config import build
from rl_accel.errors import CommError
from rl_accel.hosts.deepspeed import checks, gradients, weights

logger = logging.getLogger(__name__)

BLOCK = "sdp4bit"
"""Key of the block in a DeepSpeed configuration."""


def attach(engine: Any, config: SDP4BitConfig) -> Handle:
    """Attach to a `DeepSpeedEngine`; see `rl_accel.comm.attach`. Collective over the data-parallel group."""
    group = engine.seq_data_parallel_group
    backend = codec.load_backend(config.backend, engine.device).__name__
    checks.check(engine, config, group, backend)
    optimizer = engine.optimizer
    name = type(optimizer).__name__
    if name != "DeepSpeedZeroOptimizer_Stage3" and not weights.groups_agree(optimizer, group):
        raise CommError("4-bit communication does not cover parameter groups that are sharded over different ranks")
    if name == "DeepSpeedZeroOptimizer_Stage3":
        config = replace(config, weights=False)
    handle = Handle(topology.build(group, config.local_size), config, f"DeepSpeed {name}", torch.device(engine.device))

    if name == "DeepSpeedZeroOptimizer_Stage3":
        _count_steps(optimizer, handle)
        gradients.attach_stage3(optimizer, handle)
    else:
        weights.attach(optimizer, handle)
        handle.holds(lambda: engine.module.parameters())
        if config.gradients and name == "BF16_Optimizer":
            gradients.attach_bf16_optimizer(engine, handle)
        elif config.gradients:
            gradients.attach_stage12(optimizer, handle)
        handle.check_replicas()
    optimizer.sdp4bit_handle = handle
    handle.on_detach(lambda: delattr(optimizer, "sdp4bit_handle"))
    shape = handle.topology
    logger.info(
        "4-bit communication on %s: %d ranks, %d nodes of %d",
        handle.host,
        shape.world_size,
        shape.num_nodes,
        shape.local_size,
    )
    return handle


def _count_steps(optimizer: Any, handle: Handle) -> None:
    step = optimizer.step

    @functools.wraps(step)
    def stepping(self, closure=None):
        result = step(closure)
        handle.end_step()
        return result

    handle.replace(optimizer, "step", stepping)


def initialize(*, config: Mapping[str, Any] | str | Path, **kwargs: Any) -> tuple[Any, ...]:
    """`deepspeed.initialize` for a configuration with a block `sdp4bit`, whose keys are the fields of `SDP4BitConfig`.

    Args:
        config: DeepSpeed's configuration or a JSON file with it; the block is taken out before DeepSpeed reads it.
        kwargs: as `deepspeed.initialize` takes them.

    Returns:
        what `deepspeed.initialize` returns. The handle is `engine.optimizer.sdp4bit_handle`.

    Raises:
        ConfigError: for an unknown or bad key of the block, before an engine is built.
        CommError: if the engine cannot be served.
    """
    import deepspeed

    plain = dict(config) if isinstance(config, Mapping) else json.loads(Path(config).read_text())
    block = plain.pop(BLOCK, None)
    settings = None if block is None else build(SDP4BitConfig, block, BLOCK)
    built = deepspeed.initialize(config=plain, **kwargs)
    if settings is not None:
        attach(built[0], settings)
    return built
