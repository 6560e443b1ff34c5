"""A run whose rollouts have low-bit experts, with drafts: what it says of its mismatch; the same run after a restart.

Refreshes are warm, so a restart has to restore what they go on from. One run of two steps; then its second step is
taken away, and it goes on.
"""

from __future__ import annotations

import shutil

import pytest
import torch

from rl_accel.moe import store

from .trainings import TIMEOUT_S, tokens_of, trained

STEPS = 2
OVERRIDES = (
    "recipe=gsm8k_grpo/cpu_moe+moe",
    "rl_accel.moe.refresh=warm",
    "rl_accel.moe.max_refresh_share=0.9",
    "rl_accel.draft.method=das",
    "actor_rollout_ref.actor.use_kl_loss=false",
    f"trainer.total_training_steps={STEPS}",
    "trainer.save_freq=1",
    "trainer.test_freq=-1",
)


@pytest.fixture(scope="module")
def run(trainings):
    return trainings.run("milo", *OVERRIDES)


def test_a_run_with_low_bit_experts_corrects_and_shows_what_they_change(run) -> None:
    """Kernels hold the quantized values, read back; probabilities are off by more than rounding, and little."""
    assert "experts in 3 bits, rank 16 (lossy)" in run.output
    assert sorted(run.metrics()) == [1, 2]
    for step, metrics in run.metrics().items():
        assert 0 <= metrics["rl_accel/sync/readback_max_abs_err"] < 1e-5
        assert 1e-5 < metrics["rl_accel/rollout/mismatch_kl"] < 1e-2
        assert 1e-4 < metrics["rl_accel/rollout/changed_share"] < 0.05
        assert metrics["training/rollout_actor_probs_pearson_corr"] > 0.98
        # 3.5 bits, and rank 16 of 512 x 128 and 128 x 256 in 4.25 bits a value; starts beside them.
        assert metrics["rl_accel/moe/bits_per_weight"] == pytest.approx(4.21, abs=0.005)
        assert 0.1 < metrics["rl_accel/moe/error"] < 0.2
        assert metrics["rl_accel/moe/alternations"] == (4 if step == 1 else 1), "the first refresh is cold"
        assert metrics["rl_accel/moe/refresh_s"] > 0
        assert metrics["rl_accel/moe/version"] == step + 1
        # verl weighs tokens by the trainer's policy over the engine's, near 1 and not 1.
        assert metrics["rollout_corr/rollout_is_mean"] == pytest.approx(1.0, abs=0.05)
        assert metrics["rollout_corr/rollout_is_std"] > 1e-3
    assert run.metrics()[STEPS]["rl_accel/moe/refresh_share"] > 0
    assert run.metrics()[STEPS]["rollout/spec_num_accepted_tokens"] > 0


def test_a_restart_goes_on_with_the_same_codes(run, trainings) -> None:
    """The second step again, from the checkpoint of the first: the same tokens, updates and codes."""
    checkpoints, tokens, metrics = run.path / "checkpoints", tokens_of(run, STEPS), run.metrics()[STEPS]
    state = f"rl_accel/moe/engine{0:03d}.safetensors"
    expected = store.load(checkpoints / f"global_step_{STEPS}" / state)
    assert store.version(checkpoints / f"global_step_{STEPS}" / state) == STEPS + 1, "before the last sync"
    shutil.rmtree(checkpoints / f"global_step_{STEPS}")
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("1")
    process, _, _ = trainings.start("milo", *OVERRIDES)
    assert process.wait(TIMEOUT_S) == 0, trainings.output("milo")[-6000:]
    assert tokens_of(run, STEPS) == tokens
    again = run.metrics()[STEPS]
    # To rounding: importance weights hold log-probs of the engine, whose last bits depend on the batch.
    assert {name: again[name] for name in trained(metrics)} == pytest.approx(trained(metrics), rel=1e-5, abs=1e-7)
    found = store.load(checkpoints / f"global_step_{STEPS}" / state)
    assert found.keys() == expected.keys() and len(found) == 8
    for name, tensor in found.items():
        assert torch.equal(tensor.matrix.codes, expected[name].matrix.codes), name
        assert torch.equal(tensor.factors.u_codes, expected[name].factors.u_codes), name
