"""A run of the mixture-of-experts recipe with drafts: engine and trainer hold the same policy, experts among it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from rl_accel.quickstart.deep import MOE_POLICY

from .trainings import assert_same_policy

STEPS = 2


@pytest.fixture(scope="module")
def run(trainings):
    return trainings.run(
        "moe",
        "recipe=gsm8k_grpo/cpu_moe",
        "rl_accel.draft.method=das",
        f"trainer.total_training_steps={STEPS}",
        f"trainer.save_freq={STEPS}",
        "trainer.test_freq=-1",
        "actor_rollout_ref.actor.use_kl_loss=false",
    )


def test_engine_and_trainer_hold_the_same_policy(run) -> None:
    """What is sent is read back from the kernels after every sync, routers and experts too; log-probs agree."""
    assert sorted(run.metrics()) == list(range(1, STEPS + 1))
    for metrics in run.metrics().values():
        assert_same_policy(metrics)
        assert metrics["training/rollout_probs_diff_max"] <= 1e-5
        assert metrics["rl_accel/sync/bytes"] > 4 * 3.6e6, "all experts travel, in float32"
    assert run.metrics()[STEPS]["rollout/spec_num_accepted_tokens"] > 0


def test_experts_and_routers_learn(run) -> None:
    state = torch.load(
        run.path / f"checkpoints/global_step_{STEPS}/actor/model_world_size_1_rank_0.pt", weights_only=False
    )
    start = load_file(MOE_POLICY / "model.safetensors")
    router = "model.layers.1.mlp.gate.weight"
    now = getattr(state[router], "_local_tensor", state[router])
    assert (now - start[router].float()).abs().max() > 1e-5
    experts = state["model.layers.1.mlp.experts.down_proj"]
    experts = getattr(experts, "_local_tensor", experts)
    first = torch.stack([start[f"model.layers.1.mlp.experts.{i}.down_proj.weight"].float() for i in range(8)])
    moved = (experts - first).abs().flatten(1).max(1).values
    assert (moved > 1e-5).sum() >= 4, "of 8 experts"
