"""The life of drafting history in a verl run: epochs are closed, shared between engines, saved and restored.

Every rollout engine keeps its own history (`proposer.py`). At the end of an epoch each one closes its own; where
there are several engines, each is given what the others have packed since, because a problem may meet another engine in
the next epoch. That goes through Ray's object store, one segment (at most 64 MB) at a time, so nodes need no folder in
common. A checkpoint holds one snapshot per engine under `global_step_N/rl_accel/draft/`.

History makes rollouts faster and is no part of the training's state: whatever fails here is logged with its reason,
counted by a metric, and training goes on, at worst without history. Only an engine that is gone stops it.

Host symbols (verl 0.9.1): `trainer.steps_per_epoch`, `.global_steps`.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from rl_accel.draft.config import HISTORY_METHODS
from rl_accel.draft.history import MANIFEST
from rl_accel.draft.record import Rollout, append_rollouts
from rl_accel.feature import Feature, Trainer
from rl_accel.hosts.verl.metrics import row_names

logger = logging.getLogger(__name__)

OLD_FOLDER = "rl_accel_draft"
"""Beside the folder of features, in checkpoints from before there was one."""
SNAPSHOT = re.compile(r"(engine\d{3,})(\.old\d+)?")
"""Of an engine; an old one stands in for a new one whose save was killed (`rl_accel/draft/history.py`)."""


class DraftTrainer(Trainer):
    """Keeps history where drafting is by DAS, and records rollouts where that was asked for."""

    def __init__(self, feature: Feature, settings: Any, trainer: Any):
        super().__init__(feature, settings, trainer)
        self.live = settings.method in HISTORY_METHODS
        self.failures = {"history_refused": 0, "history_not_saved": 0, "history_not_shared": 0}
        """Since the start: snapshots that were not restored or not saved, segments that did not reach an engine."""
        self.num_shared = 0
        """Since the start: segments that an engine took from another one."""

    def restore(self) -> None:
        """After a resume: load the snapshots that the checkpoint holds, and close the epoch if it ended there."""
        step = self.trainer.global_steps
        if not self.live or step == 0:
            return
        with self._survived("restored", "history_refused"):
            folder = self._folder_to_restore()
            names = sorted({found[1] for path in folder.glob("*") if (found := SNAPSHOT.fullmatch(path.name))})
            if not names:
                logger.warning("rl_accel: the checkpoint of step %d holds no drafting history; starting without", step)
                return
            number = len(self.trainer.engines.servers())
            paths = [(str(folder / names[i % len(names)]),) for i in range(number)]
            answers = self.trainer.engines.call_each(self.feature.name, "open", paths)
            self.failures["history_refused"] += sum(not answer.get("restored") for answer in answers)
            for answer in answers:
                if not answer.get("restored"):
                    logger.error("rl_accel: drafting history is not restored: %s", answer.get("reason"))
        self.on_step_end()  # a checkpoint is written before its step ends

    def on_step_end(self) -> None:
        """Close the epoch if this step was its last, and share it."""
        trainer = self.trainer
        if not self.live or trainer.global_steps % max(trainer.steps_per_epoch, 1) != 0:
            return
        epoch = (trainer.global_steps - 1) // max(trainer.steps_per_epoch, 1)
        servers = trainer.engines.servers()
        several = len(servers) > 1
        with self._survived("closed", "history_not_shared"):
            trainer.engines.call(self.feature.name, "close_epoch", epoch, trainer.global_steps, several)
        for server in servers if several else []:
            with self._survived("shared", "history_not_shared"):
                self._share(server, [other for other in servers if other is not server])

    def _share(self, server: Any, others: list[Any]) -> None:
        """Give each of `others` what `server` has packed since it was last asked."""
        engines, name = self.trainer.engines, self.feature.name
        while segment := engines.call_some([server], name, "take_segment")[0]:
            taken = engines.call_some(others, name, "add_segment", segment)
            self.num_shared += sum(map(bool, taken))
            self.failures["history_not_shared"] += len(others) - sum(map(bool, taken))

    def save(self) -> None:
        """Write a snapshot per engine into the checkpoint of this step."""
        if not self.live:
            return
        with self._survived("saved", "history_not_saved"):
            folder = self.trainer.feature_folder(self.feature.name)
            folder.mkdir(parents=True, exist_ok=True)
            names = [f"engine{i:03d}" for i in range(len(self.trainer.engines.servers()))]
            paths = [(str(folder / name),) for name in names]
            answers = self.trainer.engines.call_each(self.feature.name, "save", paths)
            for name, answer in zip(names, answers, strict=True):
                if not answer:
                    continue  # its drafter has failed, which the engine has counted
                error = answer.get("error")
                if error is None and not (folder / name / MANIFEST).exists():
                    error = f"{folder / name} is written on the engine's node and not seen here; share that folder"
                if error is not None:
                    self.failures["history_not_saved"] += 1
                    logger.error("rl_accel: drafting history is not saved, a resume may start without: %s", error)
            _remove_others(folder, names)

    def metrics(self) -> dict[str, float]:
        if not self.live:
            return {}
        return {"history_shared": float(self.num_shared), **{name: float(n) for name, n in self.failures.items()}}

    def on_rollouts(self, step: int, epoch: int, keys: Sequence[str], rollouts: Any) -> None:
        if self.settings.record:
            record_rollouts(os.path.join(self.trainer.accel.run_dir, "rollouts.jsonl"), keys, rollouts, epoch, step)

    def _folder_to_restore(self) -> Path:
        folder = self.trainer.feature_folder(self.feature.name)
        older = folder.parent.parent / OLD_FOLDER
        return older if older.is_dir() and not folder.is_dir() else folder

    @contextmanager
    def _survived(self, what: str, counter: str) -> Iterator[None]:
        """Log and count an error instead of stopping the training."""
        try:
            yield
        except ray.exceptions.RayActorError:  # the engine is gone, and with it the rollouts
            raise
        except Exception:
            self.failures[counter] += 1
            logger.exception("rl_accel: drafting history is not %s; training goes on", what)


def _remove_others(folder: Path, names: Sequence[str]) -> None:
    """Remove snapshots of engines that an earlier run had more."""
    for path in folder.glob("*"):
        found = SNAPSHOT.fullmatch(path.name)
        if found and found[1] not in names:
            shutil.rmtree(path, ignore_errors=True)


def record_rollouts(path: str, keys: Sequence[str], rollouts: Any, epoch: int, step: int) -> None:
    """Append the rollouts of one step to a file for `scripts/bench_draft.py`."""
    append_rollouts(
        path,
        [
            Rollout(int(epoch), int(step), problem, sample, tuple(prompt.tolist()), tuple(response.tolist()))
            for (problem, sample, _), prompt, response in zip(
                row_names(keys, rollouts), rollouts["prompts"].unbind(), rollouts["responses"].unbind(), strict=True
            )
        ],
    )
