"""The weight gather of ZeRO-1, ZeRO-2 and BF16_Optimizer, inside `step` only.

`step` casts the new master shard over this rank's slice of the held weights and calls `all_gather_dp_groups`, a name of
the optimizer's module. A dispatcher on that name finds by the list of flat groups whose call it is; checkpoints and
other callers get the function that was there before. The slice as the other ranks still hold it is copied before
the step: one shard, P/W weights, for as long as `step` runs. A step skipped for overflow returns before the gather.

Host symbols: `stage_1_and_2.all_gather_dp_groups`, `bf16_optimizer.all_gather_dp_groups`, `optimizer.step`; the flat
weights and shards are `bit16_groups_flat` and `parallel_partitioned_bit16_groups`, or `bf16_groups_flat` and
`bf16_partitioned_groups`.
"""

from __future__ import annotations

import functools
import importlib
import types
from typing import Any

import torch
import torch.distributed as dist

from rl_accel.comm.handle import Handle

_NAMES = {
    "DeepSpeedZeroOptimizer": ("bit16_groups_flat", "parallel_partitioned_bit16_groups"),
    "BF16_Optimizer": ("bf16_groups_flat", "bf16_partitioned_groups"),
}


class _Gather:
    """One optimizer's weights: copies shards before a step, sends what changed in it."""

    def __init__(self, optimizer: Any, handle: Handle):
        self.handle = handle
        flat_name, parts_name = _NAMES[type(optimizer).__name__]
        self.groups_flat: list[torch.Tensor] = getattr(optimizer, flat_name)
        self.partitioned: list[list[torch.Tensor]] = getattr(optimizer, parts_name)
        self.old_shards: list[torch.Tensor] | None = None

    def before_step(self) -> None:
        if self.handle.quantise_weights():
            rank = self.handle.topology.rank
            self.old_shards = [parts[rank].detach().clone() for parts in self.partitioned]

    def after_step(self) -> None:
        self.old_shards = None

    def send(self) -> None:
        assert self.old_shards is not None
        rank = self.handle.topology.rank
        for flat, parts, old in zip(self.groups_flat, self.partitioned, self.old_shards, strict=True):
            new = parts[rank].detach().clone()
            self.handle.collectives.gather_difference(flat.detach(), new, old)


def attach(optimizer: Any, handle: Handle) -> None:
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
        return result

    handle.replace(optimizer, "step", stepping)
    if gather is not None:
        dispatcher = _dispatcher(type(optimizer).__module__)
        dispatcher.gathers[id(gather.groups_flat)] = gather
        handle.on_detach(lambda: dispatcher.remove(id(gather.groups_flat)))


class _Dispatcher:
    """Stands for `all_gather_dp_groups` in one module of DeepSpeed while any engine of it is attached."""

    def __init__(self, module: types.ModuleType):
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
                    return self.original(groups_flat, *args, **kwargs)
                return gather.send()

        all_gather_dp_groups.rl_accel_dispatcher = self
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
