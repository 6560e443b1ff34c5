"""Polls of verl's own replay buffer on a virtual clock: sooner where they only look, verl's own where they act."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from verl.trainer.ppo.v1 import replay_buffer as verl_replay_buffer

from rl_accel.fast_path.hosts import polling
from rl_accel.fast_path.hosts.polling import AdaptivePolling, only_collects

BATCH = 8


class Clock:
    """Stands for the module `time`; sleeping takes no time."""

    def __init__(self):
        self.now = 1000.0

    def time(self):
        return self.now

    monotonic = time

    def sleep(self, seconds):
        self.now += seconds


class Rollouts:
    """Stands for TransferQueue: prompts run for a while and then are finished, or have failed without a response."""

    def __init__(self, clock, failing):
        self.clock, self.failing = clock, failing
        self.random = random.Random(0)
        self.groups: dict[str, tuple[float, bool]] = {}
        self.count = 0

    def start(self, number):
        for _ in range(number):
            self.count += 1
            seconds = 20 * self.random.lognormvariate(0, 0.5)
            self.groups[f"u{self.count}"] = (self.clock.now + seconds, self.random.random() < self.failing)

    def kv_list(self):
        found = {}
        for uid, (end, fails) in self.groups.items():
            status = "running" if self.clock.now < end else "failure" if fails else "finished"
            found[uid] = {"is_prompt": True, "global_steps": 1, "status": status}
            if status == "finished":
                found[f"{uid}_0_0"] = {}
        return {"train": found}

    def kv_clear(self, partition_id, keys):
        for key in keys:
            self.groups.pop(key, None)


@pytest.fixture
def seconds_of_a_run(monkeypatch):
    """Seconds of ten steps, with or without our polls."""

    def run(ours: bool, refill: bool, failing: float) -> float:
        clock = Clock()
        rollouts = Rollouts(clock, failing)
        for module in (verl_replay_buffer, polling):
            monkeypatch.setattr(module, "time", clock)
        monkeypatch.setattr(verl_replay_buffer, "tq", rollouts)
        buffer = verl_replay_buffer.ReplayBuffer(
            trainer_mode="sync",
            trainer_config=OmegaConf.create(),
            max_off_policy_threshold=None,
            max_off_policy_strategy="drop",
            sampler_kwargs=OmegaConf.create(),
            refill_fn=rollouts.start,
            train_batch_size=BATCH,
            gen_batch_size=1,
            sync_refill_failed_groups=refill,
        )
        if ours:
            AdaptivePolling(buffer)
        for step in range(10):
            rollouts.start(BATCH)
            batch, _ = buffer.sample(global_steps=step, partition_id="train", batch_size=BATCH)
            assert len(batch.keys) == BATCH
        return clock.now - 1000.0

    return run


def test_steps_that_replace_groups_are_not_slowed_down(seconds_of_a_run):
    """Waiting until a rollout can be done delayed the replacement of failed groups: 1.55 times the time."""
    assert seconds_of_a_run(True, refill=True, failing=0.4) == seconds_of_a_run(False, refill=True, failing=0.4)


def test_steps_that_only_collect_end_sooner(seconds_of_a_run):
    assert seconds_of_a_run(True, refill=False, failing=0.0) < seconds_of_a_run(False, refill=False, failing=0.0)


@pytest.mark.parametrize(
    ("metric", "refill", "collects"), [(None, False, True), ("reward", False, False), (None, True, False)]
)
def test_what_a_poll_does_is_read_off_the_buffer(metric, refill, collects):
    buffer = verl_replay_buffer.ReplayBuffer.__new__(verl_replay_buffer.ReplayBuffer)
    buffer.filter_groups_metric, buffer.sync_refill_failed_groups = metric, refill
    assert only_collects(buffer) is collects
    assert not only_collects(SimpleNamespace(filter_groups_metric=None, sync_refill_failed_groups=False))
