"""Checks `strategy=deepspeed` and points verl's configuration at our settings class."""

from __future__ import annotations

from typing import Any

from omegaconf import open_dict

from rl_accel.deepspeed.hosts import checks
from rl_accel.feature import Driver
from rl_accel.hosts.verl import training_roles

CONFIG_CLASS = "rl_accel.deepspeed.hosts.engine_config.DeepSpeedEngineConfig"


class DeepSpeedDriver(Driver):
    """Acts where a role of verl asks for the engine, also on a plain verl command."""

    always = True

    def check(self, config: Any) -> None:
        checks.check(config, self.settings, asked_for=self.settings.enabled)

    def prepare(self, config: Any) -> None:
        with open_dict(config):
            for role in training_roles.with_strategy(config, checks.STRATEGY):
                node = training_roles.node(config, role)
                node._target_ = CONFIG_CLASS
                node.strategy = checks.STRATEGY
                node.zero_stage = self.settings.zero_stage
                node.ds_config = dict(self.settings.ds_config)

    def summary(self, config: Any) -> str:
        on = bool(training_roles.with_strategy(config, checks.STRATEGY))
        return f"training by DeepSpeed ZeRO {self.settings.zero_stage}" if on else ""
