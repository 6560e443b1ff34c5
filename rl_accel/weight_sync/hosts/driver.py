"""The watched weight sync before a run starts."""

from __future__ import annotations

from typing import Any

from rl_accel.feature import Driver


class SyncDriver(Driver):
    """Part of every run, so not worth a word."""

    def summary(self, config: Any) -> str:
        return ""
