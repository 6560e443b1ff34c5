"""Whether what is served does what it promised: accepted tokens of drafts against those that were expected.

A head that has seen little is too sure of itself. The temperature of its probabilities is moved until both agree, so
that drafts are as long as is worth it; the drafted tokens do not depend on it.
"""

from __future__ import annotations

MIN_DRAFTS = 256
"""Before anything is said of a version."""
WORSE = 0.5
"""A version that has less than this share of the calibration of the one before is taken back."""
RATE, MAX_TEMPERATURE = 0.05, 4.0
SILENT = 0.02
"""Below so many accepted tokens a drafted one the head is silent."""


class ServedWatch:
    """Counts since the version was installed."""

    def __init__(self) -> None:
        self._num_drafts = self._num_drafted = self._num_accepted = 0
        self._expected = 0.0
        self._before: float | None = None
        self.silent = False
        self.temperature = 1.0

    def begin(self) -> None:
        """Another version is served from now on."""
        if self._num_drafts >= MIN_DRAFTS and not self.silent:
            self._before = self.calibration
        self._num_drafts = self._num_drafted = self._num_accepted = 0
        self._expected, self.silent = 0.0, False

    def observe(self, num_drafts: int, num_drafted: int, expected: float, num_accepted: int) -> str:
        """Count; returns `worse` or `silent` once when there is reason to, else ""."""
        self._num_drafts += num_drafts
        self._num_drafted += num_drafted
        self._expected += expected
        self._num_accepted += num_accepted
        if expected > 0.0:
            error = (expected - num_accepted) / (expected + num_drafts)
            self.temperature = min(max(self.temperature * (1.0 + RATE * error), 1.0), MAX_TEMPERATURE)
        if self._num_drafts < MIN_DRAFTS or self.silent:
            return ""
        if self._before is not None and self.calibration < WORSE * self._before:
            self._before = None
            return "worse"
        if self._num_accepted < SILENT * self._num_drafted:
            self.silent = True
            return "silent"
        if self._num_drafts > 16 * MIN_DRAFTS:  # forget slowly, so that a policy that moves away is noticed
            for name in ("_num_drafts", "_num_drafted", "_num_accepted"):
                setattr(self, name, getattr(self, name) // 2)
            self._expected /= 2.0
        return ""

    @property
    def calibration(self) -> float:
        return self._num_accepted / max(self._expected, 1e-9)
