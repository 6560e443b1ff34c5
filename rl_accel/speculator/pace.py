"""How much the trainer trains: without rest while the head gets better, little when it does not.

A run begins, or another domain, with the head far from what it could be: every second of training pays then. Later the
policy moves slowly, and a small share of the time keeps up with it.

Source: ours.
"""

from __future__ import annotations

from collections import deque

WINDOW_S = 6.0
"""Seconds of training over which progress is judged."""
PROGRESS = 1.15
"""Gain in expected accepted tokens over the window for which it goes on without rest."""
FALL = 0.9
"""Of the best served acceptance, running: below it the head is behind again."""
FORGET = 0.995
STEADY_SHARE = 0.02


class Pace:
    """Judges progress by what the gate measures."""

    def __init__(self) -> None:
        self._history: deque[tuple[float, float]] = deque()
        self._best = 0.0
        self.share = 1.0
        """Of the time, to train in."""

    def observe(self, train_s: float, candidate_accept: float, served_accept: float) -> None:
        """Take a comparison of the gate.

        Args:
            train_s: seconds of training so far.
            candidate_accept, served_accept: expected accepted tokens a draft (`SwapGate`).
        """
        if served_accept < FALL * self._best:
            self.share, self._best = 1.0, candidate_accept
            self._history.clear()
        self._best = max(self._best * FORGET, candidate_accept, served_accept)
        self._history.append((train_s, candidate_accept))
        while len(self._history) > 1 and self._history[1][0] <= train_s - WINDOW_S:
            self._history.popleft()
        since, before = self._history[0]
        if train_s - since >= WINDOW_S and candidate_accept < PROGRESS * before:
            self.share = STEADY_SHARE
