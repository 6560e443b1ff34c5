"""4-bit communication in a run on two ranks, and what a checkpoint restores of it."""

from __future__ import annotations

import shutil

import pytest
import torch

from .trainings import STEPS, assert_same_policy, tokens, trained


def whole_weights(path):
    """What DeepSpeed's own script makes of a checkpoint."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return get_fp32_state_dict_from_zero_checkpoint(str(path / f"checkpoints/global_step_{STEPS}/actor"))


def test_training_with_4_bit_communication_and_resuming(trainings):
    """As above, the figures are among the metrics, and steps 3 and 4 are the same from the checkpoint of step 2."""
    flags = (
        "trainer=deepspeed",
        "rl_accel.comm.enable=true",
        "rl_accel.allow_lossy=true",
        "rl_accel.comm.bypass=never",
    )
    run = trainings.run("deepspeed_comm", *flags)
    assert len(run.metrics()) == STEPS
    assert run.metrics()[1]["actor/kl_loss"] == pytest.approx(0, abs=1e-9), "policy and reference start equal"
    assert run.metrics()[STEPS]["actor/kl_loss"] > 1e-5
    for step in run.metrics().values():
        assert_same_policy(step)
        assert step["actor/rl_accel/comm/gradients_quantized"] == step["actor/rl_accel/comm/weights_quantized"] == 1
        assert step["actor/rl_accel/comm/gradient_intra_bytes"] > 0
        assert step["actor/rl_accel/comm/weight_intra_bytes"] > 0

    again = trainings.root / "deepspeed_again"
    shutil.copytree(run.path, again)
    shutil.rmtree(again / f"checkpoints/global_step_{STEPS}")
    (again / "checkpoints/latest_checkpointed_iteration.txt").write_text("2")
    resumed = trainings.run("deepspeed_again", *flags)
    assert tokens(resumed) == tokens(run)
    assert trained(resumed.metrics()[STEPS]) == trained(run.metrics()[STEPS])
    expected, found = whole_weights(run.path), whole_weights(resumed.path)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
