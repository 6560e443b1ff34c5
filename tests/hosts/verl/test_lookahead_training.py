"""A run whose rollouts, of training and validation, a smaller model writes ahead, with hints in the policy's engine."""

from __future__ import annotations

import psutil

from .trainings import STEPS, assert_same_policy, assert_same_run


def test_it_is_the_run_without_it(plain_run, lookahead_run) -> None:
    """Tokens, validation, updates and weights to the last bit; log-probs to rounding."""
    assert_same_run(lookahead_run, plain_run)
    for metrics in lookahead_run.metrics().values():
        assert_same_policy(metrics)


def test_it_was_in_force(lookahead_run) -> None:
    metrics = lookahead_run.metrics()
    for step in range(1, STEPS + 1):
        found = {name: metrics[step][f"rl_accel/lookahead/training/{name}"] for name in ("texts", "drafted_texts")}
        assert found == {"texts": 16, "drafted_texts": 16}
        for name in ("failed_texts", "drafts_lost"):
            assert metrics[step][f"rl_accel/lookahead/training/{name}"] == 0
        assert metrics[step]["rl_accel/lookahead/training/agreement"] > 0.2
        assert metrics[step]["rl_accel/draft/hinted_tokens"] > 0
    assert metrics[STEPS]["rl_accel/lookahead/validation/drafted_texts"] == 16
    assert metrics[STEPS]["rl_accel/lookahead/validation/agreement"] > 0.2
    assert "lookahead by quickstart in all (exact)" in lookahead_run.output


def test_no_server_is_left(lookahead_run) -> None:
    log = str(lookahead_run.path)
    left = [
        process for process in psutil.process_iter(["cmdline"]) if "vllm" in " ".join(process.info["cmdline"] or [])
    ]
    assert not [process for process in left if log in " ".join(process.environ().values())]
    assert (lookahead_run.path / "draft_server.log").stat().st_size > 0
