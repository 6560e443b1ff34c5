"""A feature of another package, which uses every part of the contract; its registry line is `entry_points.txt`."""

from __future__ import annotations

from dataclasses import dataclass

from rl_accel.errors import ConfigError
from rl_accel.feature import Feature, Metric


@dataclass(frozen=True)
class ToyConfig:
    """A switch, a number, and what it claims."""

    enable: bool = False
    size: int = 3
    claim: str = "test.toy"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"rl_accel.toy.size must be at least 1; got {self.size}")

    @property
    def enabled(self) -> bool:
        return self.enable


FEATURE = Feature(
    name="toy",
    title="toy",
    config=ToyConfig,
    claims=lambda settings: frozenset({settings.claim}),
    metrics=(
        Metric("weight_syncs", "1", "sum", "seen by the engine since the start"),
        Metric("steps", "1", "max", "seen by the trainer, also before a resume"),
        Metric("updates", "1", "mean", "seen by a rank"),
        Metric("micro_batches", "1", "mean", "without gradients, seen by a rank"),
    ),
    driver="toy_feature.roles:ToyDriver",
    engine="toy_feature.roles:ToyEngine",
    rank="toy_feature.roles:ToyRank",
    agent_loop="toy_feature.roles:ToyAgentLoop",
    trainer="toy_feature.roles:ToyTrainer",
    probe="toy_feature.roles:ToyProbe",
    register="toy_feature.roles:register",
    import_hooks={"verl.utils.tracking": "toy_feature.roles:seen"},
    patches="toy_feature.roles:PATCHES",
)
