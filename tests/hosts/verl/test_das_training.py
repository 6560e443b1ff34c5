"""DAS in the real trainer: the same run as without drafts, and a history that survives checkpoints.

Eight problems in two epochs of two steps, so steps 3 and 4 meet the problems of steps 1 and 2 again. The toy feature of
`tests/feature` is on as well: what the contract gives to a feature is asserted here.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rl_accel.compare.tokens import load_tokens
from rl_accel.draft.record import read_rollouts

TWO_EPOCHS = ("data.train_size=8",)
TOY = (Path(__file__).parents[2] / "feature" / "toy", "rl_accel.toy.enable=true", "rl_accel.toy.size=7")
DAS = (*TWO_EPOCHS, "rl_accel.draft.method=das", "rl_accel.draft.record=true", *TOY[1:])


def run_das(trainings, name):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TOY[0]))
        return trainings.run(name, *DAS)


@pytest.fixture(scope="module")
def das(trainings):
    return run_das(trainings, "das")


def tokens_of(run, step):
    return {key: row.token_ids.tolist() for key, row in load_tokens(run.path / "tokens" / f"{step}.npz").items()}


def resumed_from_step_2(trainings, das, name):
    """Copy the run as it was after step 2 and train on."""
    target = trainings.root / name
    shutil.copytree(das.path, target)
    shutil.rmtree(target / "checkpoints" / "global_step_4")
    (target / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    return run_das(trainings, name)


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
    assert (
        "rl_accel/draft/accepted_by_epoch_1" not in metrics[2] or metrics[2]["rl_accel/draft/accepted_by_epoch_1"] == 0
    )
    assert metrics[3]["rl_accel/draft/accepted_by_epoch_1"] > 0
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


@pytest.fixture(scope="module")
def resumed(trainings, das):
    return resumed_from_step_2(trainings, das, "das_resumed")


def test_history_comes_back_with_the_checkpoint(resumed, das) -> None:
    metrics = resumed.metrics()
    assert metrics[3]["rl_accel/draft/history_refused"] == 0
    assert metrics[3]["rl_accel/draft/accepted_by_epoch_1"] > 0, "nothing was drafted from before the resume"
    assert tokens_of(resumed, 4) == tokens_of(das, 4)


def test_a_feature_of_another_package_takes_part_everywhere(das, resumed) -> None:
    """In the driver's summary, engine, rank, trainer, patches, and a checkpoint of its own."""
    assert "drafting by das, a toy of size 7" in das.output
    assert (das.path / "checkpoints" / "global_step_4" / "rl_accel" / "toy" / "steps").read_text() == "4"
    for step, metrics in das.metrics().items():
        assert metrics["toy/patched"] == 1
        assert metrics["rl_accel/toy/weight_syncs"] == step, "the first is that of the start"
        assert metrics["rl_accel/toy/steps"] == metrics["actor/rl_accel/toy/updates"] == step
    third = resumed.metrics()[3]
    assert third["rl_accel/toy/weight_syncs"] == 1, "engines are new"
    assert third["rl_accel/toy/steps"] == third["actor/rl_accel/toy/updates"] == 3, "restored"
