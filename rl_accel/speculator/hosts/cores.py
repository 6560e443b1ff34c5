"""Cores of the engine that it leaves to the trainer while that trains.

The threads of a CPU engine wait for each other many times a layer. Where they are as many as the cores, a process
beside them takes the time of all; with one thread less the engine loses what that thread did and nothing more (two
cores, a policy of 24 layers: steps take 1.5 times as long, not 2 to 3 times).
"""

from __future__ import annotations

import os

import torch


class Cores:
    """Changes the number of threads of this process."""

    def __init__(self) -> None:
        self._all = torch.get_num_threads()
        self._left = 0

    def leave(self, count: int) -> None:
        """Leave so many cores to others, as far as the machine has no more and one remains."""
        free = len(os.sched_getaffinity(0)) - self._all
        left = min(max(count - max(free, 0), 0), self._all - 1)
        if left != self._left:
            self._left = left
            torch._C.set_num_threads(self._all - left)  # vLLM's CPU worker replaces torch.set_num_threads
