"""Decides, from times measured while training, whether a collective is worth quantizing on this link.

Both ways are tried on a few optimizer steps each, all ranks add up their times, and the faster way is kept until the
next try. Tries get rarer while the answer stays the same. Times are per call of the collective, so steps of many and of
few micro-batches compare, and exclude the wait for ranks that come later (`CommHandle.timed`). Source: ours.
Cost: `TRIES` steps the slower way, at about step 0, 64, 192, 448, ..., with a barrier before each of their collectives;
one all-reduce of two numbers a decision.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

TRIES = 3
"""Steps each way that a decision rests on."""
WARM_UP = 2
"""Steps before the first try: buffers and connections are made in them."""
FIRST_PERIOD, LONGEST_PERIOD = 64, 4096
"""Steps between decisions; doubled whenever the answer is the same as before."""


@dataclass
class Bypass:
    """One collective's choice between quantized and plain. All ranks take the same steps and decide the same."""

    enabled: bool = True
    """False: always quantized."""
    quantized: bool = True
    """The choice at this step."""
    step: int = 0
    next_try: int = WARM_UP
    period: int = FIRST_PERIOD
    kept: bool = True
    """The last decision."""
    quantized_s: float | None = None
    """Seconds a call, quantized, mean of all ranks, at the last decision."""
    plain_s: float | None = None
    """The same of the plain way."""
    _tries: dict[str, list[float]] = field(default_factory=lambda: {"quantized": [], "plain": []})

    @property
    def trying(self) -> bool:
        """Whether this step's time counts for a decision."""
        return self.enabled and self.step >= self.next_try

    def end_step(self, seconds: float | None, group: dist.ProcessGroup, device: torch.device | str = "cpu") -> None:
        """Take the seconds that a call of the collective cost in the step that ends, and choose for the next one.

        Args:
            seconds: of this rank, mean of the step's calls; None: the step sent nothing (a skipped step sends no
                weights), which is no try.
            group: the ranks that decide together; one all-reduce at a decision.
            device: where the all-reduce takes place.
        """
        if self.trying and seconds is not None:
            self._tries["quantized" if self.quantized else "plain"].append(seconds)
            if all(len(times) >= TRIES for times in self._tries.values()):
                self._decide(group, device)
        self.step += 1
        if self.trying:
            self.quantized = len(self._tries["quantized"]) <= len(self._tries["plain"])
        else:
            self.quantized = self.kept

    def _decide(self, group: dist.ProcessGroup, device: torch.device | str) -> None:
        times = torch.tensor([median(self._tries[way]) for way in ("quantized", "plain")], dtype=torch.float64)
        times = times.to(device)
        dist.all_reduce(times, group=group)
        self.quantized_s, self.plain_s = (times / dist.get_world_size(group)).tolist()
        choice = self.quantized_s <= self.plain_s
        self.period = min(2 * self.period, LONGEST_PERIOD) if choice == self.kept else FIRST_PERIOD
        self.kept = choice
        self.next_try = self.step + self.period
        self._tries = {"quantized": [], "plain": []}

    @property
    def gain(self) -> float | None:
        """Seconds plain over seconds quantized at the last decision; None before it."""
        if self.plain_s is None or self.quantized_s is None:
            return None
        smallest = 1e-9  # a clock that ticks too slowly, not a collective without a cost
        return max(self.plain_s, smallest) / max(self.quantized_s, smallest)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises KeyError for a state without one of the fields."""
        for name in asdict(self):
            setattr(self, name, copy.deepcopy(state[name]))

    def shared(self) -> tuple[Any, ...]:
        """What is the same on all ranks, whose times are not."""
        tries = {way: len(times) for way, times in self._tries.items()}
        return self.quantized, self.step, self.next_try, self.period, self.kept, sorted(tries.items())
