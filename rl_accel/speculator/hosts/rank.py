"""The speculator on a training rank of the policy: traces of verl's pass of old log-probs, which is computed anyway.

A tap is only a help: what fails in it is counted and logged once, the tap is off from then on, and the pass goes on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from rl_accel.feature import Rank
from rl_accel.hosts.verl import RUN_ENV
from rl_accel.speculator.hosts.trainer_tap import TrainerTap

logger = logging.getLogger(__name__)


class SpeculatorRank(Rank):
    """Settings: `history` and `max_share` of the head's configuration, and `num_samples` of a problem."""

    def __init__(self, settings: Mapping[str, Any]):
        super().__init__(settings)
        self.tap: TrainerTap | None = None
        self.failed = False

    def attach(self, engine: Any, optimizer: Any) -> None:
        model = getattr(engine, "module", engine)
        # An adapter can be left out of a pass, and what runs then is the reference policy.
        if not hasattr(model, "peft_config"):
            self._contained(self._make, model)

    def begin_inference(self, micro_batch: Any) -> None:
        if self.tap is not None:
            self._contained(self.tap.begin, micro_batch)

    def end_inference(self) -> None:
        if self.tap is not None:
            self._contained(self.tap.end)

    def begin_update(self) -> None:
        if self.tap is not None:
            self.tap.pass_ended()

    def metrics(self) -> dict[str, float]:
        found = self.tap.metrics() if self.tap is not None else {"trainer_tap_rows": 0.0, "trainer_tap_share": 0.0}
        return {**found, "trainer_taps_off": float(self.failed)}

    def _make(self, model: Any) -> None:
        settings = self.settings
        self.tap = TrainerTap(
            model, settings["history"], settings["num_samples"], settings["max_share"], os.environ.get(RUN_ENV, "")
        )

    def _contained(self, call: Callable[..., None], *args: Any) -> None:
        try:
            call(*args)
            error = self.tap.error if self.tap is not None else None
        except Exception as raised:
            error = raised
        if error is not None:
            self.failed = True
            if self.tap is not None:
                self.tap.detach()
            self.tap = None
            logger.error("rl_accel.speculator: traces of old log-probs failed; the pass goes on", exc_info=error)
