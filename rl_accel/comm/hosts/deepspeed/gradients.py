"""The gradient reduction of each optimizer class of DeepSpeed, quantized.

- ZeRO-1, ZeRO-2: `optimizer.allreduce_and_scatter`, replaced on the instance. DeepSpeed all-reduces a whole bucket
  there, already averaged, and each rank keeps the slices that are its own. Here buckets wait for each other
  (rl_accel/comm/reduction.py) until `optimizer.reduce_ipg_grads` has reduced the last one; it is replaced too. What a
  rank owns is then written to where DeepSpeed keeps it by that time: its buffer of the partition, or the gradients of
  the parameters, which it has moved out of the bucket.
- BF16_Optimizer: `engine.allreduce_bucket`, replaced on the instance. Its norm looks at the gradients of all ranks, so
  the reduced shards are gathered again, 8 bits.
- ZeRO-3: the name `reduce_scatter_coalesced` of the module stage3, for calls from an attached optimizer's
  `__avg_scatter_grads` only.

All of it is before norm, clipping and overflow check, so these see what every rank sees.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from rl_accel.comm.handle import CommHandle


def joined(slices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return 1-D slices as one tensor; a view where they follow each other in memory."""
    first = slices[0]
    position, one_storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for part in slices:
        if part.untyped_storage().data_ptr() != one_storage or part.storage_offset() != position:
            return torch.cat(list(slices))
        position += part.numel()
    return first.as_strided((position - first.storage_offset(),), (1,))


def attach_stage12(optimizer: Any, handle: CommHandle) -> None:
    """Replace `allreduce_and_scatter` and `reduce_ipg_grads` on the optimizer."""
    scatter, reduce_ipg_grads = optimizer.allreduce_and_scatter, optimizer.reduce_ipg_grads
    rank = handle.topology.rank

    @functools.wraps(scatter)
    def allreduce_and_scatter(self, bucket, communication_data_type, *args, divide=True, process_group=None, **kwargs):
        with handle.timed("gradients"):
            if not handle.quantize_gradients() or divide or not bucket:
                return scatter(
                    bucket, communication_data_type, *args, divide=divide, process_group=process_group, **kwargs
                )
            slices, owned = [], []
            start = 0
            for ranks, piece, *output in bucket:
                (destination,) = ranks if isinstance(ranks, frozenset) else (ranks,)
                slices.append((destination, piece.numel()))
                if destination == rank and output and output[0] is not None:
                    owned.append((start, output[0].view(-1)))
                start += piece.numel()
            if owned:
                deliver = functools.partial(_add_to_partition, self, owned)
            else:
                deliver = functools.partial(_write_to_gradients, self, _owned_gradients(self, communication_data_type))
            handle.collectives.reduction.add(joined([piece.view(-1) for _, piece, *_ in bucket]), slices, deliver)
            return None

    @functools.wraps(reduce_ipg_grads)
    def reducing(self, comm_dtype=None):
        result = reduce_ipg_grads(comm_dtype)
        if comm_dtype is None and handle.collectives.reduction.pending:
            accelerator = get_accelerator()
            stream = self.reduction_stream if self.overlap_comm else accelerator.current_stream()
            with accelerator.stream(stream), handle.timed("gradients", calls=0):
                handle.collectives.reduction.flush()
        return result

    handle.replace(optimizer, "allreduce_and_scatter", allreduce_and_scatter)
    handle.replace(optimizer, "reduce_ipg_grads", reducing)


def _add_to_partition(optimizer: Any, owned: list[tuple[int, torch.Tensor]], start: int, values: torch.Tensor) -> None:
    """Add sums to the buffer of the partition. `owned`: (index in the bucket, slice of the buffer)."""
    for output, part in _overlaps(owned, start, values):
        optimizer._add_to_grad_partition_buffer(output, part)


def _write_to_gradients(optimizer: Any, owned: list[tuple[int, Any]], start: int, values: torch.Tensor) -> None:
    """Write sums into the gradients of parameters. `owned`: (index in the bucket, (parameter, first, values))."""
    found = [
        (at, optimizer.get_gradient_for_reduction(parameter).view(-1)[first : first + count])
        for at, (parameter, first, count) in owned
    ]
    for gradient, part in _overlaps(found, start, values):
        gradient.copy_(part)


def _overlaps(owned: Iterable[tuple[int, torch.Tensor]], start: int, values: torch.Tensor):
    """Yield the parts of what is owned that values [start, start + n) of the bucket fall on, with their values."""
    end = start + values.numel()
    for at, tensor in owned:
        low, high = max(at, start), min(at + tensor.numel(), end)
        if low < high:
            yield tensor[low - at : high - at], values[low - start : high - start]


def _owned_gradients(optimizer: Any, dtype: torch.dtype) -> list[tuple[int, Any]]:
    """Return what this rank owns of DeepSpeed's current bucket: (index in it, (parameter, first value, values))."""
    owned = []
    start = 0
    for group, index, param_id in optimizer.ipg_buckets[dtype].params:
        parameter = optimizer.bit16_groups[group][index]
        partition = dist.get_rank(group=optimizer.real_dp_process_group[group])
        if param_id in optimizer.grad_start_offset[group][partition]:
            first = int(optimizer.grad_start_offset[group][partition][param_id])
            inserted = int(optimizer.grad_partition_insertion_offset[group][partition][param_id])
            count = min(parameter.numel() - first, int(optimizer.partition_size[group]) - inserted)
            if count > 0:
                owned.append((start + first, (parameter, first, count)))
        start += parameter.numel()
    return owned


def attach_bf16_optimizer(engine: Any, handle: CommHandle) -> None:
    """Replace `allreduce_bucket` on the engine."""
    original = engine.allreduce_bucket
    rank, world_size = handle.topology.rank, handle.topology.world_size

    @functools.wraps(original)
    def allreduce_bucket(self, bucket, dp_group, dp_world_size=None):
        with handle.timed("gradients"):
            if not handle.quantize_gradients() or dp_group is not handle.topology.group:
                return original(bucket, dp_group, dp_world_size)
            flat = self.flatten(bucket)
            if self.gradient_average:
                flat.div_(dp_world_size or world_size)
            sizes = [block.numel() for block in flat.tensor_split(world_size)]
            own = torch.empty(sizes[rank], dtype=torch.float32, device=flat.device)
            handle.collectives.reduce_scatter(flat, sizes, own)
            parts = handle.collectives.gather_sum(own, sizes)
            return flat.copy_(torch.cat(parts))

    handle.replace(engine, "allreduce_bucket", allreduce_bucket)


_AVG_SCATTER_GRADS = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"


def attach_stage3(optimizer: Any, handle: CommHandle) -> None:
    """Make `reduce_scatter_coalesced` quantize while this optimizer reduces."""
    module = importlib.import_module(type(optimizer).__module__)
    dispatcher = getattr(module.reduce_scatter_coalesced, "rl_accel_dispatcher", None) or _Stage3Dispatcher(module)
    dispatcher.users += 1
    original = getattr(optimizer, _AVG_SCATTER_GRADS)

    @functools.wraps(original)
    def avg_scatter_grads(self, params_to_reduce, communication_data_type):
        with handle.timed("gradients"):
            dispatcher.handle = handle if handle.quantize_gradients() else None
            try:
                return original(params_to_reduce, communication_data_type)
            finally:
                dispatcher.handle = None

    handle.replace(optimizer, _AVG_SCATTER_GRADS, avg_scatter_grads)
    handle.on_detach(dispatcher.remove)


class _Stage3Dispatcher:
    """Stands for `reduce_scatter_coalesced` in DeepSpeed's stage3 while any engine is attached."""

    def __init__(self, module: Any):
        self.module, self.original = module, module.reduce_scatter_coalesced
        self.handle: CommHandle | None = None
        self.users = 0

        @functools.wraps(self.original)
        def reduce_scatter_coalesced(tensors, group=None):
            if self.handle is None:
                return self.original(tensors, group)
            return averaged_shards(tensors, self.handle)

        reduce_scatter_coalesced.rl_accel_dispatcher = self  # type: ignore[attr-defined]
        module.reduce_scatter_coalesced = reduce_scatter_coalesced

    def remove(self) -> None:
        self.users -= 1
        if not self.users:
            self.module.reduce_scatter_coalesced = self.original


def averaged_shards(tensors: Sequence[torch.Tensor], handle: CommHandle) -> list[torch.Tensor]:
    """Return this rank's shard of the mean of each tensor: shard r is values [r * c, (r + 1) * c), c = ceil(n / W)."""
    rank, world_size = handle.topology.rank, handle.topology.world_size
    sizes = [-(-tensor.numel() // world_size) for tensor in tensors]
    shards_WC = torch.cat([_in_shards(tensor, world_size) for tensor in tensors], dim=1)
    shards_WC.div_(world_size)
    total = sum(sizes)
    out = handle.collectives.reduce_scatter(shards_WC.view(-1), [total] * world_size, shards_WC.new_empty(total))
    parts = out.split(sizes)
    # The last shards of a tensor may lack values, or all of them.
    return [
        part[: max(0, min(size, tensor.numel() - rank * size))]
        for part, size, tensor in zip(parts, sizes, tensors, strict=True)
    ]


def _in_shards(tensor: torch.Tensor, world_size: int) -> torch.Tensor:
    flat = tensor.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % world_size)).view(world_size, -1)
