"""The fast path before a run starts."""

from __future__ import annotations

from typing import Any

from rl_accel.feature import Driver


class FastPathDriver(Driver):
    """Part of every run; only its absence is worth a word."""

    def summary(self, config: Any) -> str:
        return "" if self.settings.enable else "no fast path"
