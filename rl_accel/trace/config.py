"""Settings of what a run keeps, `rl_accel.trace.*`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TraceConfig:
    """What a run keeps for `rl_accel.compare` (`rl_accel.trace.*`)."""

    tokens: bool = False
    """Save the token ids of every training rollout under `run_dir/tokens` (1 to 3 bytes per token on disk)."""

    @property
    def enabled(self) -> bool:
        return self.tokens
