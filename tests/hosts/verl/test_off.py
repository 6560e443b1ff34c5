"""With every feature off, `rl_accel.train` is plain verl: the same rollouts and the same losses."""

from __future__ import annotations

import json

import pytest

from .trainings import STEPS

DETERMINISTIC = (
    "data.train_size=64",
    "actor_rollout_ref.rollout.top_k=1",  # one token possible: the stock sampler's order of draws cannot matter
    "actor_rollout_ref.rollout.n=1",
    "algorithm.adv_estimator=reinforce_plus_plus",  # GRPO has no gradient without differing samples
    "data.train_batch_size=16",
    "actor_rollout_ref.actor.ppo_mini_batch_size=16",
)


def rollouts(run):
    """Step -> sorted (prompt, response, score) of verl's own dump."""
    found = {}
    for step in range(1, STEPS + 1):
        lines = (run.path / "rollouts" / f"{step}.jsonl").read_text().splitlines()
        found[step] = sorted((row["input"], row["output"], row["score"]) for row in map(json.loads, lines))
    return found


def test_with_everything_off_rollouts_and_losses_are_those_of_plain_verl(trainings):
    off = trainings.run(
        "off",
        *DETERMINISTIC,
        "rl_accel.sampling.exact=false",
        "rl_accel.fast_path.enable=false",  # on in all other trainings
        f"trainer.rollout_data_dir={trainings.root}/off/rollouts",
    )
    plain = trainings.run_plain_verl(
        "plain_verl", off, f"trainer.rollout_data_dir={trainings.root}/plain_verl/rollouts"
    )
    assert "rl_accel" not in json.dumps(sorted(plain.metrics()[1]))
    assert "on: no fast path" in off.output
    assert rollouts(off) == rollouts(plain)
    gradients = [step["actor/grad_norm"] for step in off.metrics().values()]
    assert min(gradients) > 1e-4, "a run without gradients proves nothing"
    for step in range(1, STEPS + 1):
        ours, theirs = off.metrics()[step], plain.metrics()[step]
        for name in ("actor/pg_loss", "actor/kl_loss", "actor/grad_norm", "actor/entropy", "critic/score/mean"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), (step, name)
