"""The speculator in verl's trainer: head, optimizer and version go with verl's checkpoints."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import ray

from rl_accel.feature import Trainer

logger = logging.getLogger(__name__)

LOST = {"save": "heads_not_saved", "open": "heads_not_restored"}
"""Order -> counter of engines that did not follow it."""


class SpeculatorTrainer(Trainer):
    """A head is only speed: what fails here is counted and logged, and stops nobody."""

    def __init__(self, *args):
        super().__init__(*args)
        self.failures: Counter[str] = Counter({name: 0 for name in LOST.values()})

    def save(self) -> None:
        self._order("save", self.trainer.feature_folder(self.feature.name))

    def restore(self) -> None:
        folder = self.trainer.feature_folder(self.feature.name)
        if folder.is_dir():
            self._order("open", folder)
        else:
            logger.warning(
                "rl_accel: the checkpoint of step %d holds no draft head; learning anew", self.trainer.global_steps
            )

    def metrics(self) -> dict[str, float]:
        return {name: float(count) for name, count in self.failures.items()}

    def _order(self, do: str, folder: Path) -> None:
        """Have every engine save its head, or open one; more engines than heads share them."""
        count = len(self.trainer.engines.servers())
        if do == "save":
            folder.mkdir(parents=True, exist_ok=True)
            paths = [folder / f"engine{i:03d}.pt" for i in range(count)]
        else:
            found = sorted(folder.glob("engine*.pt"))
            paths = [found[i % len(found)] for i in range(count)] if found else []
        try:
            answers = (
                self.trainer.engines.call_each(self.feature.name, do, [(str(path),) for path in paths]) if paths else []
            )
        except ray.exceptions.RayActorError:  # the engine is gone, and with it the rollouts
            raise
        except Exception:
            self.failures[LOST[do]] += count
            logger.exception("rl_accel: draft heads: %s failed; training goes on", do)
            return
        for answer in answers:
            if answer.get("error"):
                self.failures[LOST[do]] += 1
                logger.error("rl_accel: draft head: %s failed: %s", do, answer["error"])
