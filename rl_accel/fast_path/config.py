"""Settings of the fast path, `rl_accel.fast_path.*`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FastPathConfig:
    """Cheaper plumbing between verl's agent loop and the engine (`rl_accel.fast_path.*`)."""

    enable: bool = True
    """The same rollouts, sooner, with every drafting method. False: verl's own plumbing."""

    @property
    def enabled(self) -> bool:
        return self.enable
