"""When an engine's steps leave traces: in bursts, as many as their share of its time allows.

A few rows take as much of a step as many, 0.3 to 0.6 ms, and chains need adjacent rows: so a step leaves traces of all
its requests or none, and steps that do so come one after the other.

Source: ours.
"""

from __future__ import annotations

BURST_S, MAX_CREDIT_S = 0.05, 0.5
"""Seconds of leaving traces that a burst begins with, and that are saved for later at most."""
LITTLE = 0.1
LITTLE_ROWS, LITTLE_EVERY_S = 4096, 60.0
"""Share of the time for training below which no more than so many rows are left in so many seconds."""


class Bursts:
    """Of one engine.

    Args:
        max_share: largest share of the engine's time that leaving traces may take.
    """

    def __init__(self, max_share: float):
        self.max_share = max_share
        self.on = True
        """Whether the next step leaves traces."""
        self._credit_s = 2.0 * BURST_S
        self._rows_before, self._little_s = 0, 0.0

    def spend(self, seconds: float) -> None:
        """Take what leaving traces took."""
        self._credit_s -= seconds

    def observe_step(self, seconds: float, train_share: float, num_rows: int) -> None:
        """Take the time of an engine step; pauses between rollouts are no time of the engine.

        Args:
            train_share: of the time, that the trainer may train.
            num_rows: rows left since the start.
        """
        self._credit_s = min(self._credit_s + self.max_share * seconds, MAX_CREDIT_S)
        self._little_s += seconds
        if self._little_s >= LITTLE_EVERY_S:
            self._rows_before, self._little_s = num_rows, 0.0
        useful = train_share >= LITTLE or num_rows - self._rows_before < LITTLE_ROWS
        self.on = useful and self._credit_s > (0.0 if self.on else BURST_S)
