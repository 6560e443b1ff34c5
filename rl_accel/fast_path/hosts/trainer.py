"""Polls of the replay buffer, set up in verl's trainer."""

from __future__ import annotations

from typing import Any

from rl_accel.fast_path.hosts.polling import AdaptivePolling
from rl_accel.feature import Feature, Trainer


class FastPathTrainer(Trainer):
    def __init__(self, feature: Feature, settings: Any, trainer: Any):
        super().__init__(feature, settings, trainer)
        AdaptivePolling(trainer.replay_buffer)
