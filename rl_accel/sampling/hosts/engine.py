"""Exact sampling in a rollout engine."""

from __future__ import annotations

from typing import Any

from rl_accel.feature import Engine


class SamplingEngine(Engine):
    """Replaces the samplers of a model runner that samples; one that pools is left alone."""

    _installed = False

    def install(self, runner: Any) -> None:
        if runner.is_pooling_model:
            return
        from rl_accel.sampling.hosts import exact_sampler

        exact_sampler.install(runner, self.settings.seed)
        self._installed = True

    def live(self) -> bool:
        return self._installed
