"""Weights that no rank holds whole: secondary shards of all units of a model, up to date where they are gathered.

Secondary shards must not outlive the weights. Who else than the optimizer changes them (an in-place edit, another
optimizer, a loader, an average swapped in) changes the fingerprint of a shard, which is taken before each forward of
the root module and around each step: versions of tensors do not tell, neither `torch._foreach_*` nor `.data` counts
one. The ranks tell each other in an all-reduce of three numbers, because an edit on one rank must renew the secondary
shards of all, and then all go out in full once. A forward of a part alone does not look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from rl_accel.comm.config import SDP4BitConfig
from rl_accel.comm.fingerprint import Watch
from rl_accel.comm.handle import CommHandle
from rl_accel.comm.secondary import SecondaryShards, Unit
from rl_accel.comm.topology import Topology
from rl_accel.errors import CommError, NotLiveError


class ShardedWeights:
    """The weights of one model whose ranks hold shards.

    Args:
        shards: what this rank owns.
        masters: what the optimizer keeps of it in higher precision, if it does. Who writes there, or into shards that
            the next step makes anew from there, changes the weights by that step, and more than 4 bits tell.
    """

    def __init__(
        self,
        handle: CommHandle,
        shards: Callable[[], Iterable[torch.Tensor]],
        masters: Callable[[], Iterable[torch.Tensor]] | None = None,
    ) -> None:
        self.handle = handle
        self.units: list[Unit] = []
        self.count = 0
        """Optimizer steps, and times that everything went out of date."""
        self._full_from = 0
        """From this count on secondary shards are worth a difference."""
        self._exchange = SecondaryShards(handle.topology, handle.config, handle.collectives.traffic)
        self._watch = Watch(shards)
        self._watch_masters = None if masters is None else Watch(masters)
        self._jumps = False
        """Whether the next step changes weights by more than an optimizer does."""
        if self._watch_masters is not None:
            self._watch_masters.look()
        self._gathers = 0
        self._gathers_before = 0

    def add_unit(self, changes: bool = True) -> Unit:
        self.units.append(Unit(changes))
        return self.units[-1]

    def register(self) -> None:
        """Let the handle compare, save and load secondary shards."""
        # The first place of each node is compared with the first places of the others, and so on.
        self.handle.register_replicas(
            lambda: [unit.held for unit in self.units if unit.held is not None], share=self.handle.topology.local_rank
        )
        self.handle.register_held(lambda: [self._state(unit) for unit in self.units])
        self.handle.on_load(self._on_load)

    def gather(self, units: Sequence[Unit], shards: Sequence[torch.Tensor], wholes: Sequence[torch.Tensor]) -> None:
        """Write the weights that all ranks compute with. Collective; what is out of date crosses between nodes first.

        Args:
            shards: of each unit what this rank owns, [n].
            wholes: of each unit where its weights go, [W, n]; a shard may lie in it.
        """
        self._gathers += 1
        stale = [pair for pair in zip(units, shards, strict=True) if self._is_stale(pair[0])]
        if stale:
            with self.handle.timed("weights"):
                self._bring_up(stale)
        self._exchange.gather(units, wholes)

    def _is_stale(self, unit: Unit) -> bool:
        needed = self.count if unit.changes else self._full_from
        return unit.count < needed or unit.saved is not None

    def _bring_up(self, stale: list[tuple[Unit, torch.Tensor]]) -> None:
        changed = self._take_saved([pair for pair in stale if pair[0].saved is not None])
        others = [pair for pair in stale if self._is_stale(pair[0])]
        in_full = [pair for pair in others if pair[0].count < self._full_from]
        changed += [pair for pair in others if pair[0].count >= self._full_from]
        if changed and not self.handle.quantize_weights():
            in_full, changed = in_full + changed, []
        for pairs, exchange in ((in_full, self._exchange.fill), (changed, self._exchange.renew)):
            if pairs:
                exchange([unit for unit, _ in pairs], [shard for _, shard in pairs])
        for unit, _ in stale:
            unit.count = self.count

    def _take_saved(self, loaded: list[tuple[Unit, torch.Tensor]]) -> list[tuple[Unit, torch.Tensor]]:
        """Fill what was held when a checkpoint was saved; returns the units that a difference is to follow for."""
        if not loaded:
            return []
        states = [unit.saved for unit, _ in loaded if unit.saved is not None]
        held = [own.to(shard) for (own, _), (_, shard) in zip(states, loaded, strict=True)]
        self._exchange.fill([unit for unit, _ in loaded], held)
        for unit, _ in loaded:
            unit.saved, unit.count = None, self.count
        return [pair for pair, (_, is_new) in zip(loaded, states, strict=True) if not is_new]

    def look(self, *_: Any) -> None:
        """Notice what others changed."""
        changed = self._watch.look()
        self.handle.wants_resync |= changed
        self._jumps |= changed and self._watch_masters is not None

    def before_forward(self, *_: Any) -> None:
        """Collective over the ranks."""
        self.look()
        if self.handle.agree():
            self.handle.wants_resync = False
            self._renew_in_full()
            self.handle.count_resync()

    def before_step(self, *_: Any) -> None:
        self.look()
        if self._watch_masters is not None:
            self._jumps |= self._watch_masters.look()

    def _renew_in_full(self) -> None:
        """Whatever the others hold is out of date."""
        self.count += 1
        self._full_from = self.count

    def after_step(self, *_: Any) -> None:
        """An optimizer step ended.

        Raises:
            NotLiveError: if none of the weights were gathered here since the last one: the host does it elsewhere.
        """
        if self.units and self.count and self._gathers == self._gathers_before:
            raise NotLiveError(
                f"4-bit weights were asked for, and {self.handle.host} gathered none through them in a step"
            )
        self._gathers_before = self._gathers
        self.count += 1
        self.handle.end_step()
        if self.handle.config.weights:
            for watch in (self._watch, self._watch_masters):
                if watch is not None:
                    watch.forget()
                    watch.look()
        self.handle.wants_resync |= self._jumps
        self._jumps = False

    def _state(self, unit: Unit) -> tuple[torch.Tensor, bool] | None:
        """What the other nodes hold of this rank's shard, and whether they hold the last step's."""
        if unit.saved is not None or unit.held is None:
            return unit.saved
        return unit.held[self.handle.topology.node].cpu().clone(), not self._is_stale(unit)

    def _on_load(self, states: Any) -> None:
        """A state was loaded, after its weights: the others hold what they held when it was saved."""
        self._watch.forget()
        if self._watch_masters is not None:
            self._watch_masters.forget()
        self._renew_in_full()
        for unit, state in zip(self.units, states or [None] * len(self.units), strict=True):
            unit.saved = state


def sends_weights(config: SDP4BitConfig, topology: Topology) -> bool:
    """Whether weights cross between nodes as differences: by default where that takes less than a replica."""
    wanted = topology.local_size > 1 if config.sharded_weights is None else config.sharded_weights
    return config.weights and wanted and topology.num_nodes > 1


def check_what_is_left(config: SDP4BitConfig, host: str) -> None:
    """Raise CommError for settings that need secondary shards, where there will be none."""
    if not config.gradients:
        raise CommError(
            f"{host} shards its weights: comm.gradients=false leaves nothing without comm.sharded_weights=true and "
            "several nodes"
        )
    if config.check_every:
        raise CommError(
            "comm.check_every needs replicas to compare: comm.sharded_weights=true on several nodes keeps some"
        )
