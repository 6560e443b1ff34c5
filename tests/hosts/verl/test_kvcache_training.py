"""A run whose rollouts have the quantized KV cache, with drafts: what it says of itself and of its mismatch."""

from __future__ import annotations

import pytest

STEPS = 2


def test_a_run_with_quantized_pages_corrects_and_shows_what_they_change(trainings) -> None:
    """Weights are the trainer's, read back; probabilities are off by more than rounding, and little."""
    run = trainings.run(
        "kvcache",
        "rl_accel.kvcache.enable=true",
        "rl_accel.allow_lossy=true",
        "rl_accel.draft.method=das",
        "algorithm.rollout_correction.rollout_is=token",
        "algorithm.rollout_correction.rollout_is_threshold=2.0",
        f"trainer.total_training_steps={STEPS}",
        "trainer.save_freq=-1",
        "trainer.test_freq=-1",
    )
    assert "INT4 KV cache (lossy)" in run.output
    assert sorted(run.metrics()) == [1, 2]
    for metrics in run.metrics().values():
        assert metrics["rl_accel/sync/readback_max_abs_err"] < 1e-6
        assert 1e-8 < metrics["rl_accel/rollout/mismatch_kl"] < 1e-2
        assert 1e-5 < metrics["rl_accel/rollout/changed_share"] < 0.02
        assert metrics["training/rollout_probs_diff_max"] > 1e-5
        assert metrics["training/rollout_actor_probs_pearson_corr"] > 0.99
        # 4 layers of 4 heads of size 32, the first in 8 bits; 1 GiB of them in blocks of 32.
        assert metrics["rl_accel/kvcache/bytes_per_token"] == 4 * (72 + 3 * 40)
        assert metrics["rl_accel/kvcache/tokens"] == pytest.approx(2**30 / 768, rel=1e-3)
        assert metrics["rl_accel/kvcache/order"] in (16, 20, 24, 28, 32)
        assert metrics["rl_accel/kvcache/measure_ms"] > 0
        assert 0.01 < metrics["rl_accel/kvcache/k_error"] < 0.3
        # verl weighs tokens by the trainer's policy over the engine's, near 1 and not 1.
        assert metrics["rollout_corr/rollout_is_mean"] == pytest.approx(1.0, abs=0.05)
        assert metrics["rollout_corr/rollout_is_std"] > 1e-5
    assert run.metrics()[STEPS]["rollout/spec_num_accepted_tokens"] > 0
