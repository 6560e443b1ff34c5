"""4-bit communication for FSDP2 (`torch.distributed.fsdp.fully_shard`), through its public custom collectives.

Gradients: every sharded module gets a reduce-scatter of ours. Weights: every module gets an all-gather with a secondary
shard (rl_accel/comm/secondary.py), so that after an optimizer step 4-bit differences cross between nodes once, and all
gathers of forward and backward passes stay inside the node. It takes P/L weights in the all-gather's dtype on every
rank: a whole replica where a node has one rank, so there it is used only with `sharded_weights=true`. Collectives over
other ranks than the mesh's, as the backward gather of `reshard_after_forward=<int>`, stay FSDP2's own. FSDP2 gathers
the next module while this one computes; on an accelerator the codec and the exchange between nodes run in its stream.

What changes weights otherwise than by the optimizer is noticed (rl_accel/comm/sharded.py); `unshard()` alone does not
look.

Host symbols: `FSDPModule.set_custom_all_gather`, `set_custom_reduce_scatter`, `reshard`, `AllGather`, `ReduceScatter`
and the defaults to go back to; `DTensor.device_mesh`; step hooks of `Optimizer`. Not covered: HSDP and other meshes
of more than one dimension, gradient divide factors, parameters of mixed dtypes in one module.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from torch.distributed.tensor import DTensor

from rl_accel.comm import topology
from rl_accel.comm.agreement import on_all_ranks
from rl_accel.comm.config import SDP4BitConfig
from rl_accel.comm.handle import CommHandle
from rl_accel.comm.sharded import ShardedWeights, check_what_is_left, sends_weights
from rl_accel.errors import CommError
from rl_accel.kernels.codec import api as codec

logger = logging.getLogger(__name__)


class QuantizedReduceScatter(ReduceScatter):
    """Two-level quantized reduce-scatter of one FSDP module."""

    def __init__(self, handle: CommHandle):
        self.handle = handle
        self.plain = DefaultReduceScatter()

    def allocate(self, size, *, dtype, device):
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        if not self.handle.topology.is_of(group):
            return self.plain(output_tensor, input_tensor, group, op, async_op)
        with self.handle.timed("gradients"):
            if not self.handle.quantize_gradients():
                return self.plain(output_tensor, input_tensor, group, op, async_op)
            if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
                raise CommError("4-bit communication does not cover FSDP2's gradient divide factors")
            world_size = self.handle.topology.world_size
            sizes = [output_tensor.numel()] * world_size
            self.handle.collectives.reduce_scatter(input_tensor.view(-1), sizes, output_tensor)
            if op == dist.ReduceOp.AVG:
                output_tensor.div_(world_size)
            return None


class DifferenceAllGather(AllGather):
    """All-gather of one FSDP module that stays inside the node, and sends the other nodes what an optimizer step
    changed before the first gather after it."""

    def __init__(self, handle: CommHandle, weights: ShardedWeights):
        self.handle, self.weights = handle, weights
        self.plain = DefaultAllGather()
        self.unit = weights.add_unit()

    def allocate(self, size, *, dtype, device):
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, async_op=False):
        if not self.handle.topology.is_of(group):
            # reshard_after_forward=<int>: in backward a module gathers what forward left on a smaller mesh.
            return self.plain(output_tensor, input_tensor, group, async_op)
        if input_tensor.dtype == torch.uint8:
            raise CommError("comm.sharded_weights does not cover FSDP modules with parameters of several dtypes")
        whole = output_tensor.view(self.handle.topology.world_size, -1)
        self.weights.gather([self.unit], [input_tensor], [whole])
        return None


def attach(module: Any, config: SDP4BitConfig, optimizer: torch.optim.Optimizer | None) -> CommHandle:
    """Attach to the root module of FSDP2; see `rl_accel.comm.attach`. Collective over the mesh."""
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.reshard()  # a forward leaves the root's parameters whole
    group, device = _mesh_group(module)
    with on_all_ranks(group) as facts:
        _check(config, optimizer)
        facts |= {"settings": asdict(config), "torch": torch.__version__}
        facts["backend"] = codec.load_backend(config.backend, device).__name__
    shape = topology.build(group, config.local_size)
    sends = sends_weights(config, shape)
    with on_all_ranks(group):
        if not sends:
            check_what_is_left(config, "FSDP2")
    config = replace(config, weights=sends)
    handle = CommHandle(shape, config, "FSDP2", device)
    parameters = [parameter for parameter in module.parameters() if isinstance(parameter, DTensor)]
    weights = ShardedWeights(handle, lambda: [parameter.to_local() for parameter in parameters])
    try:
        with on_all_ranks(group):
            for part in parts:
                _replace_collectives(part, handle, weights)
            _hook(module, optimizer, handle, weights)
    except BaseException:
        handle.detach()
        raise
    memory = 0.0
    if config.weights:
        weights.register()
        handle.register_whole_weights(lambda: _whole_weights(module, parts, weights))
        memory = sum(parameter.numel() for parameter in module.parameters()) / shape.local_size
    logger.info(
        "4-bit communication on FSDP2: %d ranks, %d nodes of %d, secondary shards of %.1f million weights a rank",
        shape.world_size,
        shape.num_nodes,
        shape.local_size,
        memory / 1e6,
    )
    return handle


def _whole_weights(module: Any, parts: list[FSDPModule], weights: ShardedWeights) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, copy) of every parameter as forward passes gather it, and of every buffer of the state dict."""
    for part in parts:
        part.reshard()
    weights.before_forward()
    names: dict[int, list[tuple[str, Any, str]]] = {id(part): [] for part in parts}
    for name, owner, attribute, part in _parameters(module, "", module):
        names[id(part)].append((name, owner, attribute))
    for part in parts:
        part.unshard()
        for name, owner, attribute in names[id(part)]:
            yield name, getattr(owner, attribute).detach().clone()
        part.reshard()
    parameters = {name for found in names.values() for name, _, _ in found}
    for name, value in module.state_dict().items():
        if name not in parameters:
            yield name, value


def _parameters(module: Any, prefix: str, part: Any) -> Iterator[tuple[str, Any, str, Any]]:
    """Yield (name, module that has it, attribute, FSDP module that shards it)."""
    part = module if isinstance(module, FSDPModule) else part
    for attribute in module._parameters:
        if module._parameters[attribute] is not None:
            yield prefix + attribute, module, attribute, part
    for name, child in module.named_children():
        yield from _parameters(child, f"{prefix}{name}.", part)


def _check(config: SDP4BitConfig, optimizer: torch.optim.Optimizer | None) -> None:
    if optimizer is None:
        raise CommError("attach to FSDP2 needs optimizer=, whose steps tell when weights changed")


def _replace_collectives(part: FSDPModule, handle: CommHandle, weights: ShardedWeights) -> None:
    if handle.config.gradients:
        part.set_custom_reduce_scatter(QuantizedReduceScatter(handle))
        handle.on_detach(lambda: part.set_custom_reduce_scatter(DefaultReduceScatter()))
    if handle.config.weights:
        part.set_custom_all_gather(DifferenceAllGather(handle, weights))
        handle.on_detach(lambda: part.set_custom_all_gather(DefaultAllGather()))


def _hook(module: Any, optimizer: Any, handle: CommHandle, weights: ShardedWeights) -> None:
    hooks = [optimizer.register_step_post_hook(weights.after_step)]
    if handle.config.weights:
        hooks += [
            optimizer.register_step_pre_hook(weights.before_step),
            module.register_forward_pre_hook(weights.before_forward, prepend=True),
        ]
    for hook in hooks:
        handle.on_detach(hook.remove)


def _mesh_group(module: Any) -> tuple[dist.ProcessGroup, torch.device]:
    meshes = {parameter.device_mesh for parameter in module.parameters() if isinstance(parameter, DTensor)}
    if len(meshes) != 1:
        raise CommError(f"4-bit communication needs all parameters on one device mesh; found {len(meshes)}")
    (mesh,) = meshes
    if mesh.ndim != 1:
        raise CommError(f"4-bit communication covers meshes of one dimension; this one has {mesh.ndim} (HSDP, TP)")
    device = next(module.parameters()).to_local().device
    if device.type != mesh.device_type:
        raise CommError("4-bit communication does not cover FSDP2's CPU offload")
    return mesh.get_group(), device
