"""The main job on the real trainer and the real engine: right samples, right weights, the same run every time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rl_accel
from rl_accel.compare.runs import load_run
from rl_accel.compare.tokens import load_tokens

STEPS = 4


def tokens(run):
    """(step, problem, sample) -> token ids."""
    rows = {}
    for step in range(1, STEPS + 1):
        for key, row in load_tokens(run.path / "tokens" / f"{step}.npz").items():
            rows[(step, *key)] = row.token_ids.tolist()
    assert len(rows) == STEPS * 16
    return rows


def trained(metrics):
    """The metrics that follow from tokens and weights: not times, not throughput, not speculation, and not the engine's
    log-probs, whose last bits depend on what was in a batch together."""
    kept = ("actor/", "critic/", "response_length/", "val-core/")
    skipped = ("actor/perf", "actor/mfu")
    return {key: value for key, value in metrics.items() if key.startswith(kept) and not key.startswith(skipped)}


def probs_diff(metrics):
    """How far engine and trainer are apart in a step; about 1e-6, of which the last bits depend on the batch."""
    found = {key: value for key, value in metrics.items() if key.startswith("training/rollout_probs_diff")}
    assert found
    return found


def weights(path):
    state = torch.load(path / f"checkpoints/global_step_{STEPS}/actor/model_world_size_1_rank_0.pt", weights_only=False)
    return {name: getattr(tensor, "_local_tensor", tensor) for name, tensor in state.items()}


def test_engine_and_trainer_hold_the_same_policy(plain_run):
    metrics = plain_run.metrics()
    assert sorted(metrics) == [1, 2, 3, 4]
    for step in metrics.values():
        assert 0 <= step["training/rollout_probs_diff_max"] < 1e-4
        assert step["training/rollout_actor_probs_pearson_corr"] > 0.9999
        assert step["rl_accel/rollout/logprob_abs_diff_mean"] < 1e-4
        assert step["rl_accel/sync/readback_max_abs_err"] < 1e-6
        assert step["rl_accel/sync/bytes"] > 1e6


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


def test_ngram_drafts_change_no_token_and_no_weight(trainings, plain_run):
    ngram = trainings.run("ngram", "rl_accel.draft.method=ngram")
    assert sum(step["rollout/spec_num_accepted_tokens"] for step in ngram.metrics().values()) > 0
    for step in ngram.metrics().values():
        accepted, drafted = step["rollout/spec_num_accepted_tokens"], step["rollout/spec_num_draft_tokens"]
        assert step["rollout/spec_accept_rate"] == pytest.approx(accepted / drafted if drafted else 0)
        assert step["rollout/spec_accept_length"] >= 1
    assert tokens(ngram) == tokens(plain_run)
    for step, metrics in plain_run.metrics().items():
        assert trained(ngram.metrics()[step]) == pytest.approx(trained(metrics), rel=1e-5, abs=1e-7), step
        assert probs_diff(ngram.metrics()[step]) == pytest.approx(probs_diff(metrics), abs=1e-5), step


def test_samples_of_a_step_differ(plain_run):
    """Guards the identity tests: they would pass on rollouts that do not depend on anything."""
    first = {key: row for key, row in tokens(plain_run).items() if key[0] == 1}
    distinct = {tuple(row) for row in first.values()}
    assert len(distinct) > len(first) // 2
