"""The speculator before a run starts."""

from __future__ import annotations

from omegaconf import DictConfig

from rl_accel.draft.config import HEAD_METHODS
from rl_accel.errors import ConfigError
from rl_accel.feature import Driver


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

    def summary(self, config: DictConfig) -> str:
        if not self.settings.enabled:
            return ""
        return "online speculator" if self.settings.learn else "speculator that does not learn"
