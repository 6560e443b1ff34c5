"""Cores of the engine that it leaves to the trainer while that trains.

The threads of a CPU engine wait for each other many times a layer. Where they are as many as the cores, a process
beside them takes the time of all; with one thread less the engine loses what that thread did and nothing more (two
cores, a policy of 24 layers: steps take 1.5 times as long, not 2 to 3 times).
"""

from __future__ import annotations

import os

import torch

CHEAP = 0.5
"""Share of a step's time that is the same for any number of tokens, from which on a core less matters little."""
FIRST_S = 12.0
"""Seconds of training before steps are told apart: a head that has learned nothing yet costs more than a core does.
With cheap steps alone, it had 0.62 to 0.69 of its later accept length after 500 requests on two of three seeds, and
rollouts of 3,072 requests took 1.19 of the time of `das`."""
FREE_CROWDING = 0.05
"""Of threads on cores that were free: they share memory and power."""
MIN_TURN, MAX_OWED_S = 0.2, 2.0
"""Share of the engine's time that the trainer gets at least, and seconds after which that is settled."""


class Cores:
    """Changes the number of threads of this process."""

    def __init__(self) -> None:
        self._all = torch.get_num_threads()
        self._left = 0

    @property
    def free(self) -> int:
        """Cores that this process does not use anyway."""
        return max(len(os.sched_getaffinity(0)) - self._all, 0)

    def crowding(self, count: int) -> float:
        """Return by how much longer, as a share, arithmetic takes here while `count` threads of others compute."""
        shared = max(count - self.free, 0)
        return max(shared / (self._all - self._left_of(count)), FREE_CROWDING)

    def leave(self, count: int) -> None:
        """Leave so many cores to others, as far as the machine has no more and one remains."""
        left = self._left_of(count)
        if left != self._left:
            self._left = left
            torch._C.set_num_threads(self._all - left)  # vLLM's CPU worker replaces torch.set_num_threads

    def _left_of(self, count: int) -> int:
        return min(max(count - self.free, 0), self._all - 1)


class Turns:
    """Says which steps need all cores: those that take long because of their tokens, not because they are steps.

    With 24 layers on two cores a step of up to 16 requests takes 1.03 to 1.11 times as long with one thread, one of 128
    requests 1.3 times. Where nearly all steps are large, the trainer gets a share of them.
    """

    def __init__(self) -> None:
        self._owed_s, self._trained_s = 0.0, 0.0
        self._pays = False

    def needs_cores(self, seconds: float, predicted: float, fixed: float, busy: bool) -> bool:
        """Whether the next step, if it is like this one, needs all cores.

        Args:
            seconds, predicted, fixed: as `CandidateSource.observe_step`.
            busy: whether the trainer trained.
        """
        self._trained_s += seconds * busy
        if self._trained_s < FIRST_S:
            return False
        needs = predicted > 0.0 and fixed < CHEAP * predicted
        had = seconds if self._pays or not needs else 0.0
        self._owed_s = min(max(self._owed_s + MIN_TURN * seconds - had, -MAX_OWED_S), MAX_OWED_S)
        self._pays = self._owed_s > 0.0 if self._pays else self._owed_s >= MAX_OWED_S
        return needs and not self._pays
