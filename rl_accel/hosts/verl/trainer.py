"""verl's synchronous trainer with a deterministic order, measured rollouts and a watched weight sync.

What differs from `PPOTrainerSync` of verl 0.9.1, which verl keeps running unchanged otherwise:
- prompt groups are named by step and position instead of a random uuid, and a batch is put in that order before it is
  used: verl takes groups as they finish, so two runs of the same seed sum their gradients in different orders;
- the replay buffer is polled every 50 ms instead of every 2 s, once a rollout can be done;
- a weight sync that does not answer is an error (`sync.timeout_s`) instead of an endless wait;
- drafting history is closed with the epochs, and saved and restored with checkpoints (`draft_history.py`);
- every step records lengths, request times, speculation counts and the mismatch of log-probs (`metrics.py`);
- what was asked for must be live in every rollout engine before the first step (`NotLiveError`).
"""

from __future__ import annotations

import os
from typing import Any

import ray
import transfer_queue as tq
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu

from rl_accel.config import AccelConfig
from rl_accel.errors import NotLiveError
from rl_accel.hosts.verl import metrics as rollout_metrics
from rl_accel.hosts.verl.draft_history import DraftHistory
from rl_accel.hosts.verl.lean_rollout import PatientPolls
from rl_accel.hosts.verl.patches import CheckpointTracker
from rl_accel.hosts.verl.prepare import TRAINER_NAME, accel_block
from rl_accel.hosts.verl.watchdog import call_within


@register_trainer(TRAINER_NAME)
class AcceleratedTrainerSync(PPOTrainerSync):
    """Synchronous PPO/GRPO trainer with rl_accel's measurements. Settings: `rollout.custom.rl_accel`."""

    def __init__(self, config):
        self.accel = AccelConfig.from_mapping(accel_block(config))
        super().__init__(config)
        PatientPolls(self.replay_buffer)
        self._group_count: dict[int, int] = {}
        self._spec_counts: dict[str, int] = {}
        self._sync_report: dict[str, float] = {}
        self._draft_metrics: dict[str, float] = {}
        self.draft_history = DraftHistory(self)
        self.resumed_from_step = -1
        self._checkpoint_pending = False

    @property
    def trainer_mode(self) -> str:
        return "sync"  # verl asks for the mode by name; the registered name of this class is another

    @trainer_mode.setter
    def trainer_mode(self, value: str) -> None:
        return None

    def on_init_end(self) -> None:
        self._check_live()
        self._sync_weights(super().on_init_end)
        self.resumed_from_step = self.global_steps
        self.draft_history.restore()

    def on_step_end(self) -> None:
        self._sync_weights(super().on_step_end)
        self.draft_history.on_step_end()

    def _save_checkpoint(self) -> None:
        self.draft_history.save()
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

    def on_sample_end(self) -> None:
        self._spec_counts = rollout_metrics.sum_counts(self._engine_rpc("rl_accel_drain_spec_stats"))
        self._draft_metrics = self.draft_history.metrics()
        super().on_sample_end()

    def on_validate_end(self) -> None:
        self._engine_rpc("rl_accel_drain_spec_stats")  # validation does not count as rollout
        self.draft_history.metrics()
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
        metrics.update(rollout_metrics.rollout_metrics(rollouts, self._spec_counts))
        metrics.update(self._draft_metrics)
        metrics.update(self._sync_report)
        rollout = self.config.actor_rollout_ref.rollout
        truncated = rollout.top_k not in (-1, 0) or rollout.top_p < 1.0
        rollout_metrics.check_mismatch(metrics, global_steps, truncated)
        if self.accel.trace.tokens and self.accel.run_dir:
            path = os.path.join(self.accel.run_dir, "tokens", f"{global_steps}.npz")
            rollout_metrics.save_rollout_tokens(path, keys, rollouts)
        if self.accel.draft.record and self.accel.run_dir:
            path = os.path.join(self.accel.run_dir, "rollouts.jsonl")
            rollout_metrics.record_rollouts(path, keys, rollouts, epoch, global_steps)

    def _engine_rpc(self, method: str) -> list[Any]:
        """Call a method of the worker extension in every engine; returns one answer per tensor-parallel group."""
        servers = [replica.servers[0] for replica in self.llm_server_manager.get_replicas()]
        answers = ray.get([server.collective_rpc.remote(method) for server in servers])
        return [answer[0] for answer in answers]

    def _check_live(self) -> None:
        wanted = {
            "exact_sampling": self.accel.sampling.exact,
            "spec_stats": self.accel.draft.method != "none",
            "das": self.accel.draft.method == "das",
        }
        for replica, live in enumerate(self._engine_rpc("rl_accel_live")):
            for feature, asked in wanted.items():
                if asked and not live.get(feature):
                    raise NotLiveError(f"{feature} was asked for and is not live in rollout replica {replica}: {live}")

    def _sync_weights(self, sync) -> None:
        call_within(sync, self.accel.sync.timeout_s, f"the weight sync of step {self.global_steps}")
        reports = [report for report in self._engine_rpc("rl_accel_sync_report") if report]
        self._sync_report = {
            f"rl_accel/sync/{name}": max(report[name] for report in reports) for name in (reports[0] if reports else {})
        }
