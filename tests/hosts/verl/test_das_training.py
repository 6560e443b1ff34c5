"""DAS in the real trainer: the same run as without drafts, and a history that survives checkpoints.

Eight problems in two epochs of two steps, so steps 3 and 4 meet the problems of steps 1 and 2 again.
"""

from __future__ import annotations

import shutil

import pytest

from rl_accel.compare.tokens import load_tokens
from rl_accel.draft.record import read_rollouts

TWO_EPOCHS = ("data.train_size=8",)
DAS = (*TWO_EPOCHS, "rl_accel.draft.method=das", "rl_accel.draft.record=true")


@pytest.fixture(scope="module")
def das(trainings):
    return trainings.run("das", *DAS)


def tokens_of(run, step):
    return {key: row.token_ids.tolist() for key, row in load_tokens(run.path / "tokens" / f"{step}.npz").items()}


def resumed_from_step_2(trainings, das, name):
    """Copy the run as it was after step 2 and train on."""
    target = trainings.root / name
    shutil.copytree(das.path, target)
    shutil.rmtree(target / "checkpoints" / "global_step_4")
    (target / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    return trainings.run(name, *DAS)


def test_tokens_and_training_are_those_without_drafts(trainings, das) -> None:
    plain = trainings.run("none_two_epochs", *TWO_EPOCHS)
    for step in (1, 2, 3, 4):
        assert tokens_of(das, step) == tokens_of(plain, step)
        ours, theirs = das.metrics()[step], plain.metrics()[step]
        for name in ("actor/grad_norm", "actor/pg_loss", "critic/score/mean"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7)


def test_the_second_epoch_is_drafted_from_the_first(das) -> None:
    metrics = das.metrics()
    assert metrics[1]["rollout/spec_num_accepted_tokens"] > 0
    assert "rl_accel/draft/accepted_by_past1" not in metrics[2] or metrics[2]["rl_accel/draft/accepted_by_past1"] == 0
    assert metrics[3]["rl_accel/draft/accepted_by_past1"] > 0
    assert metrics[4]["rl_accel/draft/closed_bytes"] > 0
    for step in metrics.values():
        assert step["rl_accel/draft/propose_ms"] > 0
        assert step["rl_accel/draft/history_refused"] == 0


def test_rollouts_are_recorded(das) -> None:
    recorded = list(read_rollouts(das.path / "rollouts.jsonl"))
    assert [r.epoch for r in recorded[:: len(recorded) // 4]][:4] == [0, 0, 1, 1]
    for step in (1, 4):
        rows = {(r.problem, r.sample): list(r.token_ids) for r in recorded if r.step == step}
        assert rows == {key: row for key, row in tokens_of(das, step).items()}
    assert all(r.prompt_token_ids for r in recorded)


def test_history_comes_back_with_the_checkpoint(trainings, das) -> None:
    resumed = resumed_from_step_2(trainings, das, "das_resumed")
    metrics = resumed.metrics()
    assert metrics[3]["rl_accel/draft/history_refused"] == 0
    assert metrics[3]["rl_accel/draft/accepted_by_past1"] > 0, "nothing was drafted from before the resume"
    assert tokens_of(resumed, 4) == tokens_of(das, 4)
