"""Traces before a run starts."""

from __future__ import annotations

from typing import Any

from rl_accel.errors import ConfigError
from rl_accel.feature import Driver


class TraceDriver(Driver):
    """`rl_accel.train` always has a run folder; a plain verl command has one where it names one."""

    def check_run(self, config: Any) -> None:
        if self.settings.tokens and not self.accel.run_dir:
            raise ConfigError("rl_accel.trace.tokens writes into rl_accel.run_dir, which is not set")

    def summary(self, config: Any) -> str:
        return ""  # it changes nothing about the run
