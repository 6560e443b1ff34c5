"""The life of drafting history in a verl run: epochs are closed, shared between engines, saved and restored.

Every rollout engine keeps its own history (`hosts/vllm/das.py`). At the end of an epoch each one closes its own; where
there are several engines, each is given what the others have packed since, because a problem may meet another engine in
the next epoch. That goes through Ray's object store, one segment (at most 64 MB) at a time, so nodes need no folder in
common. A checkpoint holds one snapshot per engine under `global_step_N/rl_accel_draft/`.

History makes rollouts faster and is no part of the training's state: whatever fails here is logged with its reason,
counted by a metric, and training goes on, at worst without history. Only an engine that is gone stops it.

Host symbols (verl 0.9.1): `trainer.steps_per_epoch`, `.global_steps`, `llm_server_manager.get_replicas()`.
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

from rl_accel.draft.history import MANIFEST

logger = logging.getLogger(__name__)

FOLDER = "rl_accel_draft"
SNAPSHOT = re.compile(r"(engine\d{3,})(\.old\d+)?")
"""Of an engine; an old one stands in for a new one whose save was killed (`rl_accel/draft/history.py`)."""
COUNTS = ("problems_renewed", "requests_let_go", "segments_dropped", "rollouts_lost")


class DraftHistory:
    """Calls the engines of one trainer; every method returns at once if drafting is not by DAS."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.live = trainer.accel.draft.method == "das"
        self.failures = {"history_refused": 0, "history_not_saved": 0, "history_not_shared": 0}
        """Since the start: snapshots that were not restored or not saved, segments that did not reach an engine."""

    def restore(self) -> None:
        """After a resume: load the snapshots that the checkpoint holds, and close the epoch if it ended there."""
        step = self.trainer.global_steps
        if not self.live or step == 0:
            return
        with self._survived("restored", "history_refused"):
            folder = self._checkpoint(step)
            names = sorted({found[1] for path in folder.glob("*") if (found := SNAPSHOT.fullmatch(path.name))})
            if not names:
                logger.warning("rl_accel: the checkpoint of step %d holds no drafting history; starting without", step)
                return
            servers = self._servers()
            paths = [(str(folder / names[i % len(names)]),) for i in range(len(servers))]
            answers = self._call_each("rl_accel_draft_open", paths)
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
        servers = self._servers()
        several = len(servers) > 1
        with self._survived("closed", "history_not_shared"):
            self._call_each("rl_accel_draft_close_epoch", [(epoch, trainer.global_steps, several)] * len(servers))
        for server in servers if several else []:
            with self._survived("shared", "history_not_shared"):
                self._share(server, [other for other in servers if other is not server])

    def _share(self, server: Any, others: list[Any]) -> None:
        """Give each of `others` what `server` has packed since it was last asked."""
        while segment := _drafting(ray.get(server.collective_rpc.remote("rl_accel_draft_take_segment"))):
            arguments = ray.put((segment,))  # once for all; Ray frees it when every engine has its copy
            calls = [other.collective_rpc.remote("rl_accel_draft_add_segment", args=arguments) for other in others]
            taken = sum(bool(_drafting(answer)) for answer in ray.get(calls))
            self.failures["history_not_shared"] += len(others) - taken

    def save(self) -> None:
        """Write a snapshot per engine into the checkpoint of this step, and forget those of removed checkpoints."""
        if not self.live:
            return
        with self._survived("saved", "history_not_saved"):
            folder = self._checkpoint(self.trainer.global_steps)
            folder.mkdir(parents=True, exist_ok=True)
            names = [f"engine{i:03d}" for i in range(len(self._servers()))]
            answers = self._call_each("rl_accel_draft_save", [(str(folder / name),) for name in names])
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
        """Return the drafters' numbers since the last call: counts summed, everything else the worst engine's."""
        if not self.live:
            return {}
        answers = [a for a in self._call_each("rl_accel_draft_metrics", [()] * len(self._servers())) if a]
        names = {name for answer in answers for name in answer}
        return {
            f"rl_accel/draft/{name}": (sum if _is_count(name) else max)(answer.get(name, 0.0) for answer in answers)
            for name in sorted(names)
        } | {f"rl_accel/draft/{name}": float(count) for name, count in self.failures.items()}

    def _checkpoint(self, step: int) -> Path:
        config = self.trainer.config.trainer
        if config.resume_mode == "resume_path" and step == self.trainer.resumed_from_step:
            return Path(os.path.abspath(config.resume_from_path)) / FOLDER
        return Path(os.path.abspath(config.default_local_dir)) / f"global_step_{step}" / FOLDER

    def _servers(self) -> list[Any]:
        return [replica.servers[0] for replica in self.trainer.llm_server_manager.get_replicas()]

    def _call_each(self, method: str, arguments: list[tuple]) -> list[Any]:
        """Call every engine with arguments of its own; returns the answer of the rank that drafts."""
        calls = [
            server.collective_rpc.remote(method, args=args)
            for server, args in zip(self._servers(), arguments, strict=True)
        ]
        return [_drafting(answer) for answer in ray.get(calls)]

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


def _drafting(answers: Sequence[Any]) -> Any:
    """Return the answer of the rank that drafts; the others' are empty."""
    return next((answer for answer in answers if answer), answers[0])


def _remove_others(folder: Path, names: Sequence[str]) -> None:
    """Remove snapshots of engines that an earlier run had more, and of checkpoints that verl has removed."""
    for path in folder.glob("*"):
        found = SNAPSHOT.fullmatch(path.name)
        if found and found[1] not in names:
            shutil.rmtree(path, ignore_errors=True)
    for other in folder.parent.parent.glob(f"global_step_*/{FOLDER}"):
        if other != folder and not (other.parent / "actor").exists():
            shutil.rmtree(other, ignore_errors=True)


def _is_count(name: str) -> bool:
    return name.startswith(("drafted_", "accepted_")) or name.endswith("_bytes") or name in COUNTS
