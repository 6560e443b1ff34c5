"""Settings of exact sampling, `rl_accel.sampling.*`."""

from __future__ import annotations

from dataclasses import dataclass

from rl_accel.config import check_seed


@dataclass(frozen=True)
class SamplingConfig:
    """Position-keyed exact sampling (`rl_accel.sampling.*`)."""

    exact: bool = False
    """Make every sampled token a pure function of (seed, problem, sample, step, position) and the logits."""
    seed: int = 0
    """Seed of the noise."""

    def __post_init__(self) -> None:
        check_seed("rl_accel.sampling.seed", self.seed)

    @property
    def enabled(self) -> bool:
        return self.exact
