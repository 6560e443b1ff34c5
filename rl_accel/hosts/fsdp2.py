"""4-bit communication for FSDP2 (`torch.distributed.fsdp.fully_shard`), through its public custom collectives.

Gradients: every sharded module gets a reduce-scatter of ours. Weights, only with `sharded_weights=true`: every module
gets an all-gather that keeps what it gathered last, sends differences after an optimizer step, and serves the second
gather of a step, in backward, from the copy. That copy is a whole replica, P weights in the all-gather's dtype on
every rank, which gives up the memory that sharding saved. Collectives over other ranks than the mesh's, as the backward
gather of `reshard_after_forward=<int>`, stay FSDP2's own.

Host symbols: `FSDPModule.set_custom_all_gather`, `set_custom_reduce_scatter`, `AllGather`, `ReduceScatter` and the
defaults to go back to; `DTensor.device_mesh`; `Optimizer.register_step_post_hook`. Not covered: HSDP and other meshes
of more than one dimension, gradient divide factors, parameters of mixed dtypes in one module.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from torch.distributed.tensor import DTensor

from rl_accel.comm import codec, topology
from rl_accel.comm.config import SDP4BitConfig
from rl_accel.comm.handle import Handle
from rl_accel.errors import CommError

logger = logging.getLogger(__name__)


class QuantisedReduceScatter(ReduceScatter):
    """Two-level quantised reduce-scatter of one FSDP module."""

    def __init__(self, handle: Handle):
        self.handle = handle
        self.plain = DefaultReduceScatter()

    def allocate(self, size, *, dtype, device):
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        if not self.handle.topology.is_of(group):
            return self.plain(output_tensor, input_tensor, group, op, async_op)
        with self.handle.timed("gradients"):
            if not self.handle.quantise_gradients():
                return self.plain(output_tensor, input_tensor, group, op, async_op)
            if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
                raise CommError("4-bit communication does not cover FSDP2's gradient divide factors")
            world_size = self.handle.topology.world_size
            self.handle.collectives.reduce_scatter(input_tensor.view(-1).chunk(world_size), output_tensor)
            if op == dist.ReduceOp.AVG:
                output_tensor.div_(world_size)
            return None


class DifferenceAllGather(AllGather):
    """All-gather of one FSDP module that keeps what the ranks hold and sends what an optimizer step changed."""

    def __init__(self, handle: Handle, steps: _StepCounter):
        self.handle, self.steps = handle, steps
        self.plain = DefaultAllGather()
        self.held: torch.Tensor | None = None
        self.held_step = -1

    def allocate(self, size, *, dtype, device):
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, async_op=False):
        if not self.handle.topology.is_of(group):
            # reshard_after_forward=<int>: in backward a module gathers what forward left on a smaller mesh.
            return self.plain(output_tensor, input_tensor, group, async_op)
        if input_tensor.dtype == torch.uint8:
            raise CommError("comm.sharded_weights does not cover FSDP modules with parameters of several dtypes")
        if self.held_step != self.steps.count:
            with self.handle.timed("weights"):
                self._renew(output_tensor, input_tensor, group)
            self.held_step = self.steps.count
        output_tensor.copy_(self.held)
        return None

    def _renew(self, output: torch.Tensor, shard: torch.Tensor, group: dist.ProcessGroup) -> None:
        """Bring `held` up to date; `shard` is a part of `output`, which may be overwritten."""
        if self.held is None or self.held_step < self.steps.full_from or not self.handle.quantise_weights():
            self.plain(output, shard, group)
            self.held = output.clone() if self.held is None else self.held.copy_(output)
            return
        own = self.held.view(self.handle.topology.world_size, -1)[self.handle.topology.rank]
        self.handle.collectives.gather_difference(self.held, shard.contiguous(), own.clone())


class _StepCounter:
    """Optimizer steps so far, and from which on held weights are worth a difference."""

    def __init__(self) -> None:
        self.count = 0
        self.full_from = 0

    def send_in_full(self, *_: Any) -> None:
        """Weights were loaded: the next gathers are full."""
        self.count += 1
        self.full_from = self.count


def attach(module: FSDPModule, config: SDP4BitConfig, optimizer: torch.optim.Optimizer | None) -> Handle:
    """Attach to the root module of FSDP2; see `rl_accel.comm.attach`. Collective over the mesh."""
    group, device = _mesh_group(module)
    if not config.sharded_weights:
        if not config.gradients:
            raise CommError(
                "FSDP2 shards its weights: comm.gradients=false leaves nothing without sharded_weights=true"
            )
        if config.check_every:
            raise CommError(
                "comm.check_every needs replicas to compare, which FSDP2 has with comm.sharded_weights=true"
            )
        config = replace(config, weights=False)
    if optimizer is None:
        raise CommError("attach to FSDP2 needs optimizer=, whose steps tell when weights changed")
    _agree(config, codec.load_backend(config.backend, device).__name__, group)
    handle = Handle(topology.build(group, config.local_size), config, "FSDP2", device)
    steps = _StepCounter()
    gathers = []
    for part in module.modules():
        if not isinstance(part, FSDPModule):
            continue
        if config.gradients:
            part.set_custom_reduce_scatter(QuantisedReduceScatter(handle))
            handle.on_detach(lambda part=part: part.set_custom_reduce_scatter(DefaultReduceScatter()))
        if config.weights:
            gathers.append(DifferenceAllGather(handle, steps))
            part.set_custom_all_gather(gathers[-1])
            handle.on_detach(lambda part=part: part.set_custom_all_gather(DefaultAllGather()))

    def after_step(*_: Any) -> None:
        steps.count += 1
        handle.end_step()

    handle.on_detach(optimizer.register_step_post_hook(after_step).remove)
    handle.on_detach(module.register_load_state_dict_post_hook(steps.send_in_full).remove)
    if config.weights:
        handle.holds(lambda: [gather.held for gather in gathers if gather.held is not None])
    shape = handle.topology
    logger.info(
        "4-bit communication on FSDP2: %d ranks, %d nodes of %d", shape.world_size, shape.num_nodes, shape.local_size
    )
    return handle


def _mesh_group(module: FSDPModule) -> tuple[dist.ProcessGroup, torch.device]:
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


def _agree(config: SDP4BitConfig, backend: str, group: dist.ProcessGroup) -> None:
    mine = {"settings": asdict(config), "backend": backend, "torch": torch.__version__}
    answers: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(answers, mine, group=group)
    for rank, theirs in enumerate(answers):
        if theirs != mine:
            raise CommError(f"ranks disagree on 4-bit communication: this rank has {mine}, rank {rank} has {theirs}")
