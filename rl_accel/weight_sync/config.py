"""Settings of the watched weight sync, `rl_accel.sync.*`."""

from __future__ import annotations

from dataclasses import dataclass

from rl_accel.config import unknown
from rl_accel.errors import ConfigError

MAX_TIMEOUT_S = 1e7
"""Four months; a wait for longer overflows in some threading libraries."""


@dataclass(frozen=True)
class SyncConfig:
    """Safety of the weight sync from trainer to rollout engine (`rl_accel.sync.*`)."""

    timeout_s: float = 600.0
    """Seconds after which a sync without an answer is an error."""
    readback: str = "first"
    """Compare what the engine's kernels use with what was sent: `first` sync only, `every` sync, or `never`."""

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s <= MAX_TIMEOUT_S:
            raise ConfigError(
                f"rl_accel.sync.timeout_s must be more than 0 s and at most {MAX_TIMEOUT_S:g} s; got {self.timeout_s}"
            )
        if self.readback not in ("first", "every", "never"):
            raise ConfigError(unknown("rl_accel.sync.readback", self.readback, ("first", "every", "never")))

    @property
    def enabled(self) -> bool:
        return True
