"""The weight sync as the trainer sees it: with a time limit, and its figures among the step's metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rl_accel.feature import Feature, Trainer
from rl_accel.weight_sync.watchdog import call_within


class SyncTrainer(Trainer):
    def __init__(self, feature: Feature, settings: Any, trainer: Any):
        super().__init__(feature, settings, trainer)
        self._last: dict[str, float] = {}

    def watch_sync(self, sync: Callable[[], None], what: str) -> Callable[[], None]:
        return lambda: call_within(sync, self.settings.timeout_s, what)

    def on_init_end(self) -> None:
        reports = [report for report in self.trainer.engines.call(self.feature.name, "last_sync") if report]
        self._last = {name: max(report[name] for report in reports) for name in (reports[0] if reports else {})}

    on_step_end = on_init_end

    def metrics(self) -> dict[str, float]:
        return dict(self._last)
