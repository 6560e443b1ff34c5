"""The speculator before a run starts."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from rl_accel.draft.config import HEAD_METHODS
from rl_accel.errors import ConfigError
from rl_accel.feature import Driver
from rl_accel.hosts.verl.training_roles import node, with_strategy

ACTOR = "actor_rollout_ref.actor"


class SpeculatorDriver(Driver):
    """Checks that drafting asks for what there is."""

    def check(self, config: DictConfig) -> None:
        method = self.accel.settings["draft"].method
        if self.settings.enabled and method not in HEAD_METHODS:
            raise ConfigError(
                f"rl_accel.speculator.enable=true drafts with a head, and rl_accel.draft.method={method} does not ask "
                "it; set rl_accel.draft.method=auto (history and head), head, or leave it out"
            )
        if method in HEAD_METHODS and not self.settings.enabled:
            raise ConfigError(
                f"rl_accel.draft.method={method} needs rl_accel.speculator.enable=true, which is its default"
            )
        if self.settings.state:
            raise ConfigError(
                "rl_accel.speculator.state is for rl_accel.speculator.serve; under verl the checkpoints hold the head"
            )

        actor = config.actor_rollout_ref.actor.strategy
        if self.settings.enabled and self.settings.trainer_tap and not self._serves(config, ACTOR):
            raise ConfigError(
                f"rl_accel.speculator.trainer_tap=true serves {ACTOR}.strategy=fsdp2 and deepspeed; it is {actor}; "
                "leave it out"
            )

    def rank_settings(self, config: DictConfig, role: str) -> dict[str, Any]:
        """Return what `SpeculatorRank` needs; Ulysses cuts sequences over ranks, so that none has all layers of one."""
        settings = self.settings
        if role != ACTOR or not (settings.trainer_tap and settings.learn and self._serves(config, role)):
            return {}
        if node(config, role).get("ulysses_sequence_parallel_size", 1) > 1:
            return {}
        return {
            "history": settings.history,
            "max_share": settings.max_trace_share,
            "num_samples": int(config.actor_rollout_ref.rollout.n),
        }

    @staticmethod
    def _serves(config: DictConfig, role: str) -> bool:
        return any(role in with_strategy(config, strategy) for strategy in ("fsdp2", "deepspeed"))

    def summary(self, config: DictConfig) -> str:
        if not self.settings.enabled:
            return ""
        return "online speculator" if self.settings.learn else "speculator that does not learn"
