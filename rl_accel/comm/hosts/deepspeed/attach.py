"""Attach 4-bit communication to a DeepSpeed engine, and the form with a block in the DeepSpeed configuration."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from rl_accel.comm import topology
from rl_accel.comm.agreement import on_all_ranks
from rl_accel.comm.config import SDP4BitConfig
from rl_accel.comm.handle import CommHandle
from rl_accel.comm.hosts.deepspeed import checks, gradients, stage3_weights, weights
from rl_accel.comm.sharded import check_what_is_left, sends_weights
from rl_accel.config import build

logger = logging.getLogger(__name__)

BLOCK = "sdp4bit"
"""Key of the block in a DeepSpeed configuration."""


def attach(engine: Any, config: SDP4BitConfig) -> CommHandle:
    """Attach to a `DeepSpeedEngine`; see `rl_accel.comm.attach`. Collective over the data-parallel group."""
    group = engine.seq_data_parallel_group
    with on_all_ranks(group) as facts:
        facts |= checks.check(engine, config, group)
    optimizer = engine.optimizer
    name = type(optimizer).__name__
    sharded = name == "DeepSpeedZeroOptimizer_Stage3"
    shape = topology.build(group, config.local_size)
    if sharded:
        served = config.sharded_weights or stage3_weights.has_shards(engine.module)
        sends = bool(served) and sends_weights(config, shape)
        with on_all_ranks(group):
            if not sends:
                check_what_is_left(config, "ZeRO-3")
        config = replace(config, weights=sends)
    handle = CommHandle(shape, config, f"DeepSpeed {name}", torch.device(engine.device))
    if not sharded:
        handle.register_replicas(lambda: engine.module.parameters())
        handle.check_replicas()
    try:
        with on_all_ranks(group):
            _join(engine, handle)
    except BaseException:
        handle.detach()
        raise
    logger.info(
        "4-bit communication on %s: %d ranks, %d nodes of %d",
        handle.host,
        shape.world_size,
        shape.num_nodes,
        shape.local_size,
    )
    return handle


def _join(engine: Any, handle: CommHandle) -> None:
    """Put the handle where DeepSpeed communicates."""
    optimizer = engine.optimizer
    name = type(optimizer).__name__
    if name == "DeepSpeedZeroOptimizer_Stage3":
        stage3_weights.attach(engine.module, optimizer, handle)
        if handle.config.gradients:
            gradients.attach_stage3(optimizer, handle)
    else:
        weights.attach(engine.module, optimizer, handle)
        if handle.config.gradients and name == "BF16_Optimizer":
            gradients.attach_bf16_optimizer(engine, handle)
        elif handle.config.gradients:
            gradients.attach_stage12(optimizer, handle)
    optimizer.sdp4bit_handle = handle
    handle.on_detach(lambda: delattr(optimizer, "sdp4bit_handle"))


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """`deepspeed.initialize` for a configuration with a block `sdp4bit`, whose keys are the fields of `SDP4BitConfig`.

    Args:
        args, kwargs: as `deepspeed.initialize` takes them. The configuration may be in `config`, `config_params` or
            `args.deepspeed_config`: a mapping, a JSON file, or its text in base64. The block is taken out before
            DeepSpeed reads it; the caller's objects stay as they are.

    Returns:
        what `deepspeed.initialize` returns. The handle is `engine.optimizer.sdp4bit_handle`.

    Raises:
        ConfigError: for an unknown or bad key of the block, before an engine is built.
        CommError: if the engine cannot be served.
    """
    import deepspeed

    given = inspect.signature(deepspeed.initialize).bind(*args, **kwargs)
    plain, block = _without_block(given.arguments)
    settings = None if block is None else build(SDP4BitConfig, block, BLOCK)
    built = deepspeed.initialize(**plain)
    if settings is not None:
        attach(built[0], settings)
    return built


def _without_block(given: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return the arguments with the block taken out of whichever holds the configuration, and the block."""
    plain = dict(given)
    for name in ("config", "config_params"):
        if plain.get(name) is not None:
            plain[name], block = _split(plain[name])
            return plain, block
    options: Any = plain.get("args")
    if getattr(options, "deepspeed_config", None) is None:
        return plain, None
    config, block = _split(options.deepspeed_config)
    if block is not None:
        # DeepSpeed takes one of both, and only `config` may be a mapping.
        plain["args"] = copy.copy(options)
        plain["args"].deepspeed_config = None
        plain["config"] = config
    return plain, block


def _split(config: Any) -> tuple[Any, Any]:
    from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config

    read = config if isinstance(config, Mapping) else load_ds_config(str(config))
    if BLOCK not in read:
        return config if isinstance(config, dict) else dict(read), None
    return {key: value for key, value in read.items() if key != BLOCK}, read[BLOCK]
