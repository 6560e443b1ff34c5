"""DeepSpeed as the training engine of a run."""

from __future__ import annotations

from .trainings import assert_same_policy


def test_training_on_two_ranks(best_of_run):
    """The shipped recipe with trainer=deepspeed: the policy that trains is the one that generates."""
    metrics = best_of_run.run.metrics()
    for step in (1, 2):
        assert_same_policy(metrics[step])
    assert metrics[2]["actor/kl_loss"] > 1e-6
    assert max(metrics[step]["actor/grad_norm"] for step in (1, 2)) > 1e-3
