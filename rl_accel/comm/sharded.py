"""What is known of weights that no rank holds whole: optimizer steps so far, and whether somebody else changed them.

Secondary shards must not outlive the weights. Who else than the optimizer changes them (an in-place edit, another
optimizer, a loader, an average swapped in) changes the fingerprint of a shard, which is taken before each forward of
the root module and around each step: versions of tensors do not tell, neither `torch._foreach_*` nor `.data` counts
one. The ranks tell each other in an all-reduce of three numbers, because an edit on one rank must renew the secondary
shards of all, and then all gathers are full once. A forward of a part alone does not look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from rl_accel.comm.fingerprint import Watch
from rl_accel.comm.handle import CommHandle


class ShardedWeights:
    """Counts steps of one model whose ranks hold shards.

    Args:
        shards: what this rank owns; also the optimizer's masters, where it has some.
    """

    def __init__(self, shards: Callable[[], Iterable[torch.Tensor]], handle: CommHandle) -> None:
        self.handle = handle
        self.count = 0
        self.full_from = 0
        """From this count on secondary shards are worth a difference."""
        self._watch = Watch(shards)

    def look(self, *_: Any) -> None:
        """Notice what others changed."""
        self.handle.wants_resync |= self._watch.look()

    def before_forward(self, *_: Any) -> None:
        """Collective over the ranks."""
        self.look()
        if self.handle.agree():
            self.handle.wants_resync = False
            self.renew_in_full()
            self.handle.count_resync()

    def renew_in_full(self) -> None:
        """Whatever the others hold is out of date."""
        self.count += 1
        self.full_from = self.count

    def after_step(self, *_: Any) -> None:
        self.count += 1
        self.handle.end_step()
        if self.handle.config.weights:
            self._watch.forget()
            self._watch.look()

    def forget(self) -> None:
        """Weights were loaded, and whatever they are is right."""
        self._watch.forget()
