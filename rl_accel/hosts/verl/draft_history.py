"""The life of drafting history in a verl run: epochs are closed, shared between engines, saved and restored.

Every rollout engine keeps its own history (`hosts/vllm/das.py`). At the end of an epoch each one closes its segment;
where there are several engines the segments are written to `run_dir/draft_history` and every engine maps those of the
others, because a problem may meet another engine in the next epoch. A checkpoint holds one snapshot per engine under
`global_step_N/rl_accel_draft/`. A snapshot that is damaged or belongs to another tokenizer is refused with the reason,
and training goes on without history.

Host symbols (verl 0.9.1): `trainer.steps_per_epoch`, `.global_steps`, `llm_server_manager.get_replicas()`.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import ray

logger = logging.getLogger(__name__)

FOLDER = "rl_accel_draft"


class DraftHistory:
    """Calls the engines of one trainer; every method returns at once if drafting is not by DAS."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.live = trainer.accel.draft.method == "das"
        self.refused = 0
        """Snapshots that could not be restored."""

    def restore(self) -> None:
        """After a resume: load the snapshots that the checkpoint holds."""
        step = self.trainer.global_steps
        if not self.live or step == 0:
            return
        folder = self._checkpoint(step)
        snapshots = sorted(folder.glob("engine*"))
        if not snapshots:
            logger.warning("rl_accel: the checkpoint of step %d holds no drafting history; starting without", step)
            return
        answers = self._call_each(
            "rl_accel_draft_open", [(str(snapshots[i % len(snapshots)]),) for i in range(len(self._servers()))]
        )
        self.refused = sum(not answer.get("restored") for answer in answers)
        for answer in answers:
            if not answer.get("restored"):
                logger.error("rl_accel: drafting history is not restored: %s", answer.get("reason"))

    def on_step_end(self) -> None:
        """Close the epoch if this step was its last."""
        trainer = self.trainer
        if not self.live or trainer.global_steps % max(trainer.steps_per_epoch, 1) != 0:
            return
        epoch = (trainer.global_steps - 1) // max(trainer.steps_per_epoch, 1)
        servers = self._servers()
        paths: list[str | None] = [None] * len(servers)
        if len(servers) > 1:
            shared = Path(trainer.accel.run_dir or trainer.config.trainer.default_local_dir) / "draft_history"
            paths = [str(shared / f"epoch{epoch:06d}-engine{i:03d}.segment") for i in range(len(servers))]
        self._call_each("rl_accel_draft_close_epoch", [(epoch, trainer.global_steps, path) for path in paths])
        if len(servers) > 1:
            others = [([p for j, p in enumerate(paths) if j != i],) for i in range(len(servers))]
            self._call_each("rl_accel_draft_read_segments", others)
            for old in sorted(Path(str(paths[0])).parent.glob("epoch*.segment")):
                if int(old.name[5:11]) < epoch - trainer.accel.draft.window:
                    old.unlink()

    def save(self) -> None:
        """Write a snapshot per engine into the checkpoint of this step, and forget those of removed checkpoints."""
        if not self.live:
            return
        folder = self._checkpoint(self.trainer.global_steps)
        folder.mkdir(parents=True, exist_ok=True)
        self._call_each("rl_accel_draft_save", [(str(folder / f"engine{i:03d}"),) for i in range(len(self._servers()))])
        for other in folder.parent.parent.glob(f"global_step_*/{FOLDER}"):
            if other != folder and not (other.parent / "actor").exists():
                shutil.rmtree(other, ignore_errors=True)

    def metrics(self) -> dict[str, float]:
        """Return the drafters' numbers since the last call: counts summed, everything else the worst engine's."""
        if not self.live:
            return {}
        answers = [a for a in self._call_each("rl_accel_draft_metrics", [()] * len(self._servers())) if a]
        names = {name for answer in answers for name in answer}
        return {
            f"rl_accel/draft/{name}": (sum if _is_count(name) else max)(answer.get(name, 0.0) for answer in answers)
            for name in sorted(names)
        } | {"rl_accel/draft/history_refused": float(self.refused)}

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
        return [next((a for a in answer if a), answer[0]) for answer in ray.get(calls)]


def _is_count(name: str) -> bool:
    return name.startswith(("drafted_", "accepted_")) or name.endswith("_bytes")
