"""What the speculator brings against what its trainer costs, and how much the trainer may train for that.

Credit: the engine's time that accepted tokens of the head saved, less what drafting them took. Debit: the time by which
engine steps were longer because the trainer trained. After a first period on credit the trainer has to earn its share:
it is halved while the balance of the last period is negative, to nothing in the end, and tried again now and then.

Source: ours.
"""

from __future__ import annotations

CREDIT_S = 25.0
"""Seconds of training before the balance is asked for."""
PERIOD_S = 20.0
"""Seconds of engine steps in a period."""
SMALLEST, RETRY_SHARE, RETRY_S = 0.02, 0.1, 600.0
FIRST_SLOWDOWN = 0.5
"""Of steps while the trainer has a core that the engine left, before it was measured."""
RATE = 0.02
STEADY = 0.5
"""Share of training below which steps with and without it are mixed enough to be compared."""


class Ledger:
    """Seconds of one engine."""

    def __init__(self) -> None:
        self.share = 1.0
        """Of the time, that the trainer may train."""
        self.slowdown = FIRST_SLOWDOWN
        """Longer steps while it trains, as a share."""
        self.saved_s = self.charged_s = 0.0
        self._engine_s = self._trained_s = self._idle_s = 0.0
        self._saved, self._charged = 0.0, 0.0
        self._ratios = {True: 1.0, False: 1.0}
        self._busy_share = 1.0

    def observe_step(self, seconds: float, predicted: float, busy: bool) -> None:
        """Take a step's time.

        Args:
            predicted: seconds that the step was expected to take; 0: nobody knows.
            busy: whether the trainer trained.
        """
        self._busy_share += RATE * (busy - self._busy_share)
        if predicted > 0.0:
            self._ratios[busy] += RATE * (min(seconds / predicted, 4.0) - self._ratios[busy])
            if self._busy_share < STEADY:
                self.slowdown += RATE * (max(self._ratios[True] / self._ratios[False] - 1.0, 0.0) - self.slowdown)
        if busy:
            charge = seconds * self.slowdown / (1.0 + self.slowdown)
            self._charged += charge
            self.charged_s += charge
            self._trained_s += seconds
        self._engine_s += seconds
        self._idle_s = 0.0 if self.share > 0.0 else self._idle_s + seconds
        if self._engine_s >= PERIOD_S:
            self._close_period()

    def observe_saved(self, seconds: float) -> None:
        """Take what the head's drafts of a step saved; negative where they cost more."""
        self._saved += seconds
        self.saved_s += seconds

    def _close_period(self) -> None:
        net, charged = self._saved - self._charged, self._charged
        self._engine_s = self._saved = self._charged = 0.0
        if self.share == 0.0:
            if self._idle_s >= RETRY_S:
                self.share, self._idle_s = RETRY_SHARE, 0.0
        elif self._trained_s >= CREDIT_S:
            if net < 0.0 and charged > 0.0:
                self.share = self.share / 2.0 if self.share >= 2.0 * SMALLEST else 0.0
            elif net > 0.0:
                self.share = min(2.0 * self.share, 1.0)
