"""verl's synchronous trainer with a deterministic order, measured rollouts, and the features' part in a step.

What differs from `PPOTrainerSync` of verl 0.9.1, which verl keeps running unchanged otherwise:
- prompt groups are named by step and position instead of a random uuid, and a batch is put in that order before it is
  used: verl takes groups as they finish, so two runs of the same seed sum their gradients in different orders;
- features are called where they have something to do (`rl_accel.feature.Trainer`);
- every step records lengths, request times, speculation counts and the mismatch of log-probs (`metrics.py`);
- what was asked for must be live in every rollout engine before the first step (`NotLiveError`).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import ray
import transfer_queue as tq
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu

from rl_accel.config import AccelConfig
from rl_accel.errors import NotLiveError
from rl_accel.feature import AgentLoop, Trainer
from rl_accel.hosts.verl import FOLDER, engines
from rl_accel.hosts.verl import metrics as rollout_metrics
from rl_accel.hosts.verl.patches import CheckpointTracker
from rl_accel.hosts.verl.prepare import TRAINER_NAME, accel_block


def registered(module: Any) -> None:
    """Importing this module registers the trainer; called when verl has imported its own."""


@register_trainer(TRAINER_NAME)
class AcceleratedTrainerSync(PPOTrainerSync):
    """Synchronous PPO/GRPO trainer with rl_accel's measurements. Settings: `rollout.custom.rl_accel`."""

    def __init__(self, config):
        self.accel = AccelConfig.from_mapping(accel_block(config))
        super().__init__(config)
        self._group_count: dict[int, int] = {}
        self._drained: dict[str, Any] = {"counts": {}, "metrics": {}}
        self.resumed_from_step = -1
        self._checkpoint_pending = False
        self.engines = engines.RolloutEngines(self)
        self.features: list[Trainer] = [
            feature.role("trainer")(feature, self.accel.settings[feature.name], self)
            for feature in self.accel.enabled()
            if feature.trainer
        ]

    @property
    def trainer_mode(self) -> str:
        return "sync"  # verl asks for the mode by name; the registered name of this class is another

    @trainer_mode.setter
    def trainer_mode(self, value: str) -> None:
        return None

    def feature_folder(self, name: str) -> Path:
        """Return the folder of a feature in the checkpoint of this step, of the one resumed from right after that."""
        config, step = self.config.trainer, self.global_steps
        if config.resume_mode == "resume_path" and step == self.resumed_from_step:
            return Path(os.path.abspath(config.resume_from_path)) / FOLDER / name
        return Path(os.path.abspath(config.default_local_dir)) / f"global_step_{step}" / FOLDER / name

    def on_init_end(self) -> None:
        self._check_live()
        self.resumed_from_step = self.global_steps
        for feature in self.features if self.global_steps > 0 else []:
            feature.restore_before_sync()
        self._sync_weights(super().on_init_end)
        for feature in self.features:
            feature.on_init_end()
        for feature in self.features if self.global_steps > 0 else []:
            feature.restore()

    def on_step_end(self) -> None:
        self._sync_weights(super().on_step_end)
        for feature in self.features:
            feature.on_step_end()

    def _save_checkpoint(self) -> None:
        for feature in self.features:
            # What a run that was killed in this save, or found its disk full, has left.
            shutil.rmtree(self.feature_folder(feature.feature.name), ignore_errors=True)
            feature.save()
        self._remove_orphans()
        super()._save_checkpoint()
        self._checkpoint_pending = True

    def _complete_checkpoint(self) -> None:
        """Called when a step is logged; until then a resumed run starts from the checkpoint before, and logs it."""
        if self._checkpoint_pending:
            self._checkpoint_pending = False
            CheckpointTracker.complete(self.config.trainer.default_local_dir)

    def on_step_begin(self) -> None:
        self._complete_checkpoint()
        super().on_step_begin()

    def _shutdown_dump_executor(self) -> None:  # what verl calls when the last step is logged
        self._complete_checkpoint()
        super()._shutdown_dump_executor()
        for feature in self.features:
            feature.on_end()

    def _remove_orphans(self) -> None:
        """Remove what features saved in checkpoints that verl has removed."""
        current = f"global_step_{self.global_steps}"
        for folder in Path(self.config.trainer.default_local_dir).glob(f"global_step_*/{FOLDER}"):
            if folder.parent.name != current and not (folder.parent / "actor").exists():
                shutil.rmtree(folder, ignore_errors=True)

    def on_sample_end(self) -> None:
        self._drained = self._drain()
        super().on_sample_end()

    def on_validate_end(self) -> None:
        self._drain()  # validation does not count as rollout
        super().on_validate_end()

    def _fetch_one_gen_batch(self):
        batch = super()._fetch_one_gen_batch()
        first = self._group_count.get(self.global_steps, 0)
        self._group_count = {self.global_steps: first + len(batch)}
        names = [f"step{self.global_steps:08d}group{first + i:06d}" for i in range(len(batch))]
        tu.assign_non_tensor_stack(batch, "uid", names)
        return batch

    def _balance_batch(self, batch, metrics, **kwargs):
        order = sorted(range(len(batch.keys)), key=lambda i: rollout_metrics.split_key(batch.keys[i]))
        batch.reorder(order)
        return super()._balance_batch(batch, metrics, **kwargs)

    def _compute_metrics(self, batch, metrics, timing_raw, global_steps, epoch) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, global_steps, epoch)
        real = [not tag.get("is_padding", False) for tag in batch.tags]
        keys = [key for key, keep in zip(batch.keys, real, strict=True) if keep]
        rollouts = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=rollout_metrics.FIELDS)
        metrics.update(rollout_metrics.rollout_metrics(rollouts, self._drained["counts"]))
        metrics.update(self._drained["metrics"])
        metrics.update(engines.add_up(self._drain_agent_loops()))
        for feature in self.features:
            metrics.update(engines.add_up([{feature.feature.name: feature.metrics()}]))
        self._check_mismatch(metrics, global_steps)
        for feature in self.features:
            feature.on_rollouts(global_steps, epoch, keys, rollouts)

    def _check_mismatch(self, metrics, global_steps: int) -> None:
        rollout, on = self.config.actor_rollout_ref.rollout, self.accel.enabled()
        rollout_metrics.check_mismatch(
            metrics,
            global_steps,
            truncated=rollout.top_k not in (-1, 0) or rollout.top_p < 1.0,
            max_probs_diff=max(feature.max_probs_diff for feature in on),
            min_pearson=min(feature.min_pearson for feature in on),
        )

    def _drain(self) -> dict[str, Any]:
        """Return what happened in the engines since the last call: their counters, and the features' metrics."""
        answers = [answer for answer in self.engines.ask("rl_accel_drain") if answer]
        return {
            "counts": rollout_metrics.sum_counts([answer["counts"] for answer in answers]),
            "metrics": engines.add_up(answer["features"] for answer in answers),
        }

    def _drain_agent_loops(self) -> list[dict[str, dict[str, float]]]:
        """Return feature -> metrics of each agent-loop worker; nobody is asked where no feature has any."""
        if all(feature.role("agent_loop").drain is AgentLoop.drain for feature in self.accel.enabled()):
            return []
        return ray.get([worker.drain_features.remote() for worker in self.agent_loop_manager.agent_loop_workers])

    def _check_live(self) -> None:
        wanted = [feature for feature in self.accel.enabled() if feature.engine]
        for replica, live in enumerate(self.engines.ask("rl_accel_live")):
            for feature in wanted:
                if not live.get("features", {}).get(feature.name):
                    raise NotLiveError(
                        f"{feature.title} was asked for and is not live in rollout replica {replica}: {live}"
                    )

    def _sync_weights(self, sync) -> None:
        for feature in self.features:
            sync = feature.watch_sync(sync, f"the weight sync of step {self.global_steps}")
        sync()
