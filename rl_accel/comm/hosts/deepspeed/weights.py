"""The weight gather of ZeRO-1, ZeRO-2 and BF16_Optimizer, inside `step` only.

`step` casts the new master shard over this rank's slice of the held weights and calls `all_gather_dp_groups`, a name of
the optimizer's module. A dispatcher on that name finds by the list of flat groups whose call it is; checkpoints and
other callers get the function that was there before. The slice as the other ranks still hold it is copied before
the step: one shard, P/W weights, for as long as `step` runs. A step skipped for overflow returns before the gather.

What a step changes is small and fits 4 bits; what `safe_set_full_fp32_param` or a loaded checkpoint changes does not,
and much of it is written where tensors count no versions. So the shards, held and master, are fingerprinted after a
step and before the next one, and if one changed in between, all go out in full. Cost: two readings of 6 P/W bytes a
step.

Host symbols: `stage_1_and_2.all_gather_dp_groups`, `bf16_optimizer.all_gather_dp_groups`, `optimizer.step`; the flat
weights, shards and master shards are `bit16_groups_flat`, `parallel_partitioned_bit16_groups` and
`single_partition_of_fp32_groups`, or `bf16_groups_flat`, `bf16_partitioned_groups` and `fp32_groups_flat_partition`.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
import torch.distributed as dist

from rl_accel.comm.fingerprint import Watch
from rl_accel.comm.handle import CommHandle

_NAMES = {
    "DeepSpeedZeroOptimizer": (
        "bit16_groups_flat",
        "parallel_partitioned_bit16_groups",
        "single_partition_of_fp32_groups",
    ),
    "BF16_Optimizer": ("bf16_groups_flat", "bf16_partitioned_groups", "fp32_groups_flat_partition"),
}


class _Gather:
    """One optimizer's weights: copies shards before a step, sends what changed in it."""

    def __init__(self, optimizer: Any, handle: CommHandle):
        self.handle = handle
        flat_name, parts_name, masters_name = _NAMES[type(optimizer).__name__]
        self.groups_flat: list[torch.Tensor] = getattr(optimizer, flat_name)
        self.partitioned: list[list[torch.Tensor]] = getattr(optimizer, parts_name)
        self.masters: list[torch.Tensor] = getattr(optimizer, masters_name)
        self.old_shards: list[torch.Tensor] | None = None
        self.watch = Watch(self._own_shards)
        self.watch.look()

    def _own_shards(self) -> list[torch.Tensor]:
        rank = self.handle.topology.rank
        return [*self.masters, *(parts[rank] for parts in self.partitioned)]

    def before_step(self) -> None:
        if self.handle.quantize_weights():
            rank = self.handle.topology.rank
            self.old_shards = [parts[rank].detach().clone() for parts in self.partitioned]
            self.handle.wants_resync |= self.watch.look()

    def after_step(self) -> None:
        self.old_shards = None

    def end_step(self) -> None:
        """After the choice for the next step was made: only a difference needs to know what changed."""
        self.watch.forget()
        if self.handle.weights_quantized:
            self.watch.look()

    def send(self) -> None:
        assert self.old_shards is not None
        rank = self.handle.topology.rank
        in_full = False
        for flat, parts, old in zip(self.groups_flat, self.partitioned, self.old_shards, strict=True):
            new = parts[rank].detach().clone()
            in_full |= self.handle.collectives.gather_difference(flat.detach(), new, old, self.handle.wants_resync)
        if in_full:
            self.handle.count_resync()
        self.handle.wants_resync = False


def attach(optimizer: Any, handle: CommHandle) -> None:
    """Send weight differences in `optimizer.step`, and count its steps."""
    gather = _Gather(optimizer, handle) if handle.config.weights else None
    step = optimizer.step

    @functools.wraps(step)
    def stepping(self, closure=None):
        if gather is not None:
            gather.before_step()
        try:
            result = step(closure)
        finally:
            if gather is not None:
                gather.after_step()
        handle.end_step()
        if gather is not None:
            gather.end_step()
        return result

    handle.replace(optimizer, "step", stepping)
    if gather is not None:
        handle.on_load(gather.watch.forget)  # all ranks hold the weights of the checkpoint
        dispatcher = _dispatcher(type(optimizer).__module__)
        dispatcher.gathers[id(gather.groups_flat)] = gather
        handle.on_detach(lambda: dispatcher.remove(id(gather.groups_flat)))


class _Dispatcher:
    """Stands for `all_gather_dp_groups` in one module of DeepSpeed while any engine of it is attached."""

    def __init__(self, module: Any):
        self.module = module
        self.original = module.all_gather_dp_groups
        self.gathers: dict[int, _Gather] = {}

        @functools.wraps(self.original)
        def all_gather_dp_groups(groups_flat, *args, **kwargs):
            gather = self.gathers.get(id(groups_flat))
            if gather is None:
                return self.original(groups_flat, *args, **kwargs)
            with gather.handle.timed("weights"):
                if gather.old_shards is None:
                    gather.handle.wants_resync = False
                    return self.original(groups_flat, *args, **kwargs)
                return gather.send()

        all_gather_dp_groups.rl_accel_dispatcher = self  # type: ignore[attr-defined]
        module.all_gather_dp_groups = all_gather_dp_groups

    def remove(self, key: int) -> None:
        del self.gathers[key]
        if not self.gathers:
            self.module.all_gather_dp_groups = self.original


def _dispatcher(module_name: str) -> _Dispatcher:
    module = importlib.import_module(module_name)
    found = getattr(module.all_gather_dp_groups, "rl_accel_dispatcher", None)
    return _Dispatcher(module) if found is None else found


def groups_agree(optimizer: Any, group: dist.ProcessGroup) -> bool:
    """Whether all parameter groups are sharded over `group` (expert groups are not)."""
    return all(
        dist.get_process_group_ranks(other) == dist.get_process_group_ranks(group)
        for other in optimizer.real_dp_process_group
    )
