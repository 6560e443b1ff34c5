"""The gradient reduction of each optimizer class of DeepSpeed, quantized.

- ZeRO-1, ZeRO-2: `optimizer.allreduce_and_scatter`, replaced on the instance. DeepSpeed all-reduces a whole bucket
  there, already averaged, and each rank keeps the slices that are its own; here each slice goes to its rank alone.
- BF16_Optimizer: `engine.allreduce_bucket`, replaced on the instance. Its norm looks at the gradients of all ranks, so
  the reduced shards are gathered again, 8 bits.
- ZeRO-3: the name `reduce_scatter_coalesced` of the module stage3, for calls from an attached optimizer's
  `__avg_scatter_grads` only.

All of it is before norm, clipping and overflow check, so these see what every rank sees.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch

from rl_accel.comm.handle import CommHandle


def joined(slices: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Return 1-D slices as one tensor; a view where they follow each other in memory."""
    if not slices:
        return like.new_empty(0)
    first = slices[0]
    if len(slices) == 1:
        return first
    position, one_storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for part in slices:
        if part.untyped_storage().data_ptr() != one_storage or part.storage_offset() != position:
            return torch.cat(list(slices))
        position += part.numel()
    return first.as_strided((position - first.storage_offset(),), (1,))


def attach_stage12(optimizer: Any, handle: CommHandle) -> None:
    """Replace `allreduce_and_scatter` on the optimizer."""
    original = optimizer.allreduce_and_scatter
    rank, world_size = handle.topology.rank, handle.topology.world_size

    @functools.wraps(original)
    def allreduce_and_scatter(self, bucket, communication_data_type, *args, divide=True, process_group=None, **kwargs):
        with handle.timed("gradients"):
            if not handle.quantize_gradients() or divide or not bucket:
                return original(
                    bucket, communication_data_type, *args, divide=divide, process_group=process_group, **kwargs
                )
            by_rank: list[list[torch.Tensor]] = [[] for _ in range(world_size)]
            outputs = []
            for ranks, piece, *output in bucket:
                (destination,) = ranks if isinstance(ranks, frozenset) else (ranks,)
                by_rank[destination].append(piece.view(-1))
                if destination == rank:
                    outputs.append(output[0] if output else None)
            like = bucket[0][1]
            blocks = [joined(slices, like) for slices in by_rank]
            accumulates = any(output is not None for output in outputs)
            out = torch.empty_like(blocks[rank], dtype=torch.float32) if accumulates else blocks[rank]
            handle.collectives.reduce_scatter(blocks, out)
            pieces = out.split([piece.numel() for piece in by_rank[rank]])
            for piece, output, reduced in zip(by_rank[rank], outputs, pieces, strict=True):
                self._add_to_grad_partition_buffer(output, reduced)
                if reduced.data_ptr() != piece.data_ptr():
                    piece.copy_(reduced)
            return None

    handle.replace(optimizer, "allreduce_and_scatter", allreduce_and_scatter)


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
            blocks = [block.contiguous() for block in flat.tensor_split(world_size)]
            own = torch.empty_like(blocks[rank], dtype=torch.float32)
            handle.collectives.reduce_scatter(blocks, own)
            parts = handle.collectives.gather_sum(own, [block.numel() for block in blocks])
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
    blocks = [
        torch.cat([t.reshape(-1)[r * size : (r + 1) * size] for t, size in zip(tensors, sizes, strict=True)])
        for r in range(world_size)
    ]
    for block in blocks:
        block.div_(world_size)
    out = handle.collectives.reduce_scatter(blocks, torch.empty_like(blocks[rank]))
    return list(out.split([len(t.reshape(-1)[rank * n : (rank + 1) * n]) for t, n in zip(tensors, sizes, strict=True)]))
