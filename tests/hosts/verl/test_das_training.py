"""DAS with a draft head, and a feature of another package, in the real trainer: drafts from earlier epochs, and what
checkpoints restore.

Eight problems in two epochs of two steps, so steps 3 and 4 meet the problems of steps 1 and 2 again. The last session
of `das_run` is resumed from step 2; that its tokens and weights are those without drafts is in test_interruption.py.
"""

from __future__ import annotations

import torch

from rl_accel.draft.record import read_rollouts

from .trainings import tokens_of


def test_the_second_epoch_is_drafted_from_the_first_also_after_a_resume(das_run) -> None:
    metrics = das_run.run.metrics()
    assert metrics[1]["rollout/spec_num_accepted_tokens"] > 0
    assert (
        "rl_accel/draft/accepted_by_epoch_1" not in metrics[2] or metrics[2]["rl_accel/draft/accepted_by_epoch_1"] == 0
    )
    assert metrics[3]["rl_accel/draft/accepted_by_epoch_1"] > 0, "nothing was drafted from before the resume"
    assert metrics[4]["rl_accel/draft/closed_bytes"] > 0
    for step in metrics.values():
        assert step["rl_accel/draft/propose_ms"] > 0
        assert step["rl_accel/draft/history_refused"] == 0


def test_rollouts_are_recorded(das_run) -> None:
    recorded = list(read_rollouts(das_run.run.path / "rollouts.jsonl"))
    assert [r.epoch for r in recorded[:: len(recorded) // 4]][:4] == [0, 0, 1, 1]
    for step in (1, 4):
        rows = {(r.problem, r.sample): list(r.token_ids) for r in recorded if r.step == step}
        assert rows == {key: row for key, row in tokens_of(das_run.run, step).items()}
    assert all(r.prompt_token_ids for r in recorded)


def test_the_draft_head_learns_and_survives_the_kill(das_run) -> None:
    """Versions go on after the resume from step 2, and the last checkpoint holds what another run could open.

    A busy machine may not get to train in two such short steps; then all versions are the first one.
    """
    metrics = das_run.run.metrics()
    versions = [metrics[step]["rl_accel/speculator/version"] for step in (1, 2, 3, 4)]
    assert versions == sorted(versions) and versions[0] >= 1
    for step in metrics.values():
        for kind in ("not_saved", "not_restored", "off"):
            said = [line for line in das_run.run.output.splitlines() if "draft head" in line or "speculator" in line]
            assert step[f"rl_accel/speculator/heads_{kind}"] == 0, (kind, said[-20:])
        assert step["rl_accel/speculator/trainers_gone"] == 0
        assert step["rl_accel/speculator/rows_traced"] > 0
        assert step["actor/rl_accel/speculator/trainer_tap_rows"] > 0
        assert step["actor/rl_accel/speculator/trainer_taps_off"] == 0
    assert metrics[4]["rl_accel/speculator/rows_from_trainer"] > 0, "of the pass of step 3"
    state = torch.load(
        das_run.run.path / "checkpoints" / "global_step_4" / "rl_accel" / "speculator" / "engine000.pt",
        weights_only=True,
    )
    assert state["version"] >= versions[3] and torch.isfinite(state["served"]).all()


def test_a_feature_of_another_package_takes_part_everywhere(das_run) -> None:
    """In the driver's summary, engine, rank, trainer, patches, and a checkpoint of its own."""
    run = das_run.run
    assert "drafting by auto, online speculator, a toy of size 7" in run.output
    assert (run.path / "checkpoints" / "global_step_4" / "rl_accel" / "toy" / "steps").read_text() == "4"
    for step, metrics in run.metrics().items():
        assert metrics["toy/patched"] == 1
        assert metrics["rl_accel/toy/weight_syncs"] == (step if step < 3 else step - 2), "engines are new at step 3"
        assert metrics["rl_accel/toy/steps"] == metrics["actor/rl_accel/toy/updates"] == step, "restored at step 3"
        assert metrics["actor/rl_accel/toy/micro_batches"] == 4 * (step if step < 3 else step - 2), "of old log-probs"
