"""The weight gather of ZeRO-1, ZeRO-2 and BF16_Optimizer, inside `step` only.

`step` casts the new master shard over this rank's slice of the held weights and calls `all_gather_dp_groups`, a name of
the optimizer's module. A dispatcher on that name finds by the list of flat groups whose call it is; checkpoints and
other callers get the function that was there before. The slice as the other ranks still hold it is copied before
the step: one shard, P/W weights, for as long as `step` runs. A step skipped for overflow returns before the gather.

With `overlap_weights` the step returns when the own shard is renewed; the rest arrives while the next forward pass
runs, and each layer waits for its own weights. State dicts, steps, offloading and `handle.wait()` wait for all.

What a step changes is small and fits 4 bits; what `safe_set_full_fp32_param` or a loaded checkpoint changes does not,
and much of it is written where tensors count no versions. So the shards, held and master, are fingerprinted after a
step and before the next one, and if one changed in between, all go out in full. Cost: two readings of 6 P/W bytes a
step, and an all-reduce of one number.

Host symbols: `stage_1_and_2.all_gather_dp_groups`, `bf16_optimizer.all_gather_dp_groups`, `optimizer.step`,
`.offload_states`; the flat weights, shards and master shards are `bit16_groups_flat`,
`parallel_partitioned_bit16_groups` and `single_partition_of_fp32_groups`, or `bf16_groups_flat`,
`bf16_partitioned_groups` and `fp32_groups_flat_partition`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from rl_accel.comm import topology
from rl_accel.comm.background import Background
from rl_accel.comm.difference import DifferenceRing
from rl_accel.comm.difference_gather import DifferenceGather
from rl_accel.comm.fingerprint import Watch
from rl_accel.comm.handle import CommHandle
from rl_accel.comm.units import OUTSIDE, Units

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

    def __init__(self, module: torch.nn.Module, optimizer: Any, handle: CommHandle):
        self.handle = handle
        flat_name, parts_name, masters_name = _NAMES[type(optimizer).__name__]
        self.groups_flat: list[torch.Tensor] = getattr(optimizer, flat_name)
        self.partitioned: list[list[torch.Tensor]] = getattr(optimizer, parts_name)
        self.masters: list[torch.Tensor] = getattr(optimizer, masters_name)
        self.old_shards: list[torch.Tensor] | None = None
        self.watch = Watch(self._own_shards)
        self.watch.look()
        self.units = Units(module, self.groups_flat)
        self._numels = [parts[0].numel() for parts in self.partitioned]
        self._gather = DifferenceGather(handle.topology, handle.config, handle.collectives.traffic, self._numels)
        self._ring: DifferenceRing | None = None
        """With `overlap_weights`, once a forward pass has shown which units are entered."""
        self._needs: dict[int, int] = {}
        """Unit -> chunks of the ring that must be there before it runs."""
        self.background = Background(self.groups_flat[0].device)

    def _make_ring(self) -> DifferenceRing:
        """Make the ring, with groups of its own, and work out what each unit has to wait for; units that no forward
        entered count as outside. Collective."""
        handle, config = self.handle, self.handle.config
        top = topology.build(handle.topology.group, config.local_size, "weights")
        traffic, device = handle.collectives.traffic, self.groups_flat[0].device
        ring = DifferenceRing(top, config, traffic, self._numels, device, self.units.priority)
        for position, index in enumerate(ring.order):
            chunk = ring.chunks[index]
            first = chunk.owner * self._numels[chunk.flat] + chunk.start
            for number in self.units.needing(chunk.flat, first, chunk.count):
                number = number if number in self.units.entered else OUTSIDE
                self._needs[number] = position + 1
        return ring

    def entering(self, number: int) -> None:
        """A unit is about to run."""
        if self.background.running:
            with self.handle.timed("weights", calls=0):
                self.background.wait(self._needs.get(number, 0))

    def wait(self) -> None:
        """Wait until all weights are there."""
        if self.background.running:
            with self.handle.timed("weights", calls=0):
                self.background.wait()

    def _own_shards(self) -> list[torch.Tensor]:
        rank = self.handle.topology.rank
        return [*self.masters, *(parts[rank] for parts in self.partitioned)]

    def before_step(self) -> None:
        self.wait()
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

    def send(self, in_full: Callable[[], Any]) -> Any:
        """Bring what changed to all ranks, or everything by `in_full` if some rank asks for it."""
        assert self.old_shards is not None
        if self.handle.any_wants_resync():
            self.handle.count_resync()
            return in_full()
        rank = self.handle.topology.rank
        if self._ring is None and self.handle.config.overlap_weights and self.units.entered:
            self._ring = self._make_ring()
        ring = None if self.handle.trying("weights") else self._ring
        exchange = self._gather if ring is None else ring
        own = [parts[rank].detach() for parts in self.partitioned]
        new = [shard.clone() for shard in own]
        for shard, old in zip(own, self.old_shards, strict=True):
            shard.copy_(old)
        blocks = exchange.encode(new, own)
        flats = [flat.detach() for flat in self.groups_flat]
        work = exchange.run(blocks, flats)
        if ring is not None:
            self.background.start(lambda: work)
        else:
            for _ in work:
                pass
        return None


def attach(module: torch.nn.Module, optimizer: Any, handle: CommHandle) -> None:
    """Send weight differences in `optimizer.step`, and count its steps."""
    gather = _Gather(module, optimizer, handle) if handle.config.weights else None
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
    if gather is None:
        return
    handle.on_load(lambda _: gather.watch.forget())  # all ranks hold the weights of the checkpoint
    dispatcher = _dispatcher(type(optimizer).__module__)
    dispatcher.gathers[id(gather.groups_flat)] = gather
    handle.on_detach(lambda: dispatcher.remove(id(gather.groups_flat)))
    if handle.config.overlap_weights:
        _wait_where_needed(module, optimizer, handle, gather)


def _wait_where_needed(module: torch.nn.Module, optimizer: Any, handle: CommHandle, gather: _Gather) -> None:
    handle.on_wait(gather.wait)
    hooks = gather.units.hook(gather.entering)
    hooks.append(module.register_state_dict_pre_hook(lambda *_: gather.wait()))
    hooks.append(module.register_load_state_dict_pre_hook(lambda *_: gather.wait()))
    for hook in hooks:
        handle.on_detach(hook.remove)
    offload = getattr(optimizer, "offload_states", None)
    if offload is not None:

        @functools.wraps(offload)
        def offloading(self, *args, **kwargs):
            gather.wait()
            return offload(*args, **kwargs)

        handle.replace(optimizer, "offload_states", offloading)
    handle.on_detach(gather.wait)  # the first thing to be undone


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
            gather.wait()
            with gather.handle.timed("weights"):
                if gather.old_shards is None:
                    gather.handle.wants_resync = False
                    return self.original(groups_flat, *args, **kwargs)
                return gather.send(lambda: self.original(groups_flat, *args, **kwargs))

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
