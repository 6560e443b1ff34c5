"""The main job on the real trainer and the real engine: right samples, right weights, the same run every time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

import rl_accel
from rl_accel.compare.runs import load_run

from .trainings import assert_same_policy, tokens, weights


def test_engine_and_trainer_hold_the_same_policy(plain_run):
    metrics = plain_run.metrics()
    assert sorted(metrics) == [1, 2, 3, 4]
    for step in metrics.values():
        assert_same_policy(step)


def test_every_step_is_measured(plain_run):
    for step in plain_run.metrics().values():
        assert 1 <= step["response_length/p50"] <= step["response_length/p95"] <= step["response_length/max"] <= 96
        assert 0 < step["rollout/median_request_s"] <= step["rollout/slowest_request_s"] <= step["timing_s/gen"] + 0.1
        assert step["rollout/spec_accept_length"] == 1.0
        assert step["rollout/spec_num_draft_tokens"] == 0
        assert step["rollout/num_response_tokens"] == pytest.approx(step["response_length/mean"] * 16)


def test_the_run_folder_tells_what_was_run(plain_run):
    run = load_run(str(plain_run.path))
    assert run.info["finished"] is True
    assert run.info["arm"] == "none"
    assert run.info["versions"]["verl"] == "0.9.1"
    assert (plain_run.path / "curves.png").stat().st_size > 10_000
    assert "step 4: reward" in plain_run.output


def test_learning_moves_the_weights(plain_run):
    gradients = [step["actor/grad_norm"] for step in plain_run.metrics().values()]
    assert all(math.isfinite(norm) for norm in gradients)
    assert max(gradients) > 1e-3
    policy = load_file(Path(rl_accel.__file__).parent / "quickstart/policy/model.safetensors")
    moved = max(float((weights(plain_run.path)[name] - start.float()).abs().max()) for name, start in policy.items())
    assert moved > 1e-4


def test_samples_of_a_step_differ(plain_run):
    """Guards the identity tests: they would pass on rollouts that do not depend on anything."""
    first = {key: row for key, row in tokens(plain_run).items() if key[0] == 1}
    distinct = {tuple(row) for row in first.values()}
    assert len(distinct) > len(first) // 2
