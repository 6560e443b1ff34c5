"""Low-bit experts in verl's trainer: a refresh that takes too much of a step does less; checkpoints hold its state."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from rl_accel.feature import Trainer

logger = logging.getLogger(__name__)

STATE_FILE = "refresh.json"


class MoETrainer(Trainer):
    """Bounds the share of refreshes; what it decided is restored with a checkpoint, so a resumed run has the codes of
    one that was not interrupted."""

    def __init__(self, *args):
        super().__init__(*args)
        self.alternations = self.settings.alternations
        self._last_end: float | None = None
        self._share = 0.0

    def on_step_end(self) -> None:
        now = time.perf_counter()
        before, self._last_end = self._last_end, now
        seconds = max(self.trainer.engines.call(self.feature.name, "last_refresh_seconds"))
        if before is None or seconds <= 0:
            return
        self._share = seconds / (now - before)
        if self._share > self.settings.max_refresh_share and self.alternations > 1:
            self._set(max(1, self.alternations // 2))
            logger.warning(
                "rl_accel: making low-bit experts took %.0f %% of a step (rl_accel.moe.max_refresh_share=%s); from now "
                "on with %d alternations",
                100 * self._share, self.settings.max_refresh_share, self.alternations,
            )  # fmt: skip

    def metrics(self) -> dict[str, float]:
        return {"refresh_share": self._share}

    def save(self) -> None:
        folder = self.trainer.feature_folder(self.feature.name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STATE_FILE).write_text(json.dumps({"alternations": self.alternations}))
        if self.settings.refresh == "warm":
            self.trainer.engines.call_each(self.feature.name, "save", self._files(folder))

    def restore_before_sync(self) -> None:
        """What is saved is what the refresh of the checkpoint's own weights began with."""
        folder = self.trainer.feature_folder(self.feature.name)
        if not (folder / STATE_FILE).is_file():
            logger.warning("rl_accel: the checkpoint holds nothing of low-bit experts; they begin anew")
            return
        self._set(int(json.loads((folder / STATE_FILE).read_text())["alternations"]))
        if self.settings.refresh == "warm":
            self.trainer.engines.call_each(self.feature.name, "restore", self._files(folder))

    def _set(self, alternations: int) -> None:
        self.alternations = alternations
        self.trainer.engines.call(self.feature.name, "set_alternations", alternations)

    def _files(self, folder: Path) -> list[tuple[str]]:
        """One for each engine; an engine of more than one rank is refused by the driver with refresh=warm."""
        return [(str(folder / f"engine{i:03d}.safetensors"),) for i in range(len(self.trainer.engines.servers()))]
