"""What must not be claimed: runs that were killed, diverged, are of other lengths, or are one run given twice.

Every case would be "equivalent" or "identical" if it were judged on the steps and values that the runs happen to share.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from rl_accel.compare.__main__ import main
from rl_accel.compare.report import sentence
from rl_accel.compare.runs import load_run
from rl_accel.compare.tokens import save_tokens
from rl_accel.compare.verdict import Criteria, compare_arms

STEPS, SEEDS = 64, 3
REWARD, LENGTH, GEN = "critic/score/mean", "response_length/mean", "timing_s/gen"
ACCURACY = "val-core/gsm8k/acc/mean@1"
DRAWS = np.random.default_rng(0)


def write_run(folder: Path, seed: int, steps: int = STEPS, finished: bool | None = True, level: float = 0.0) -> Path:
    """A run whose metrics follow from its seed but for its times, as verl and `rl_accel.train` write it."""
    trained = np.random.default_rng(seed)
    lines = [{"step": 0, "data": {ACCURACY: 0.1}}]
    for step in range(1, STEPS + 1):
        data = {
            REWARD: 0.5 + level + 0.002 * trained.standard_normal(),
            LENGTH: 100 + 0.2 * trained.standard_normal(),
            GEN: 10 + DRAWS.standard_normal(),
        }
        if step % 16 == 0:
            data[ACCURACY] = 0.4 + level + 0.002 * trained.standard_normal()
        lines.append({"step": step, "data": data})
    folder.mkdir(parents=True)
    write_lines(folder, lines[: steps + 1])
    if finished is not None:
        (folder / "run.json").write_text(json.dumps({"seed": seed, "finished": finished}))
    return folder


def read_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_lines(folder: Path, lines: list[dict]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def edit(folder: Path, metric: str, steps: range | list[int], value: float | str | None) -> None:
    """Overwrite a metric at some steps; "absent" takes it out."""
    lines = read_lines(folder)
    for line in lines:
        if line["step"] in steps:
            line["data"].pop(metric, None)
            if value != "absent":
                line["data"][metric] = value
    write_lines(folder, lines)


@pytest.fixture
def arms(tmp_path) -> dict[str, list[Path]]:
    """Three seeds of two arms that train the same."""
    return {
        arm: [write_run(tmp_path / f"{arm}-seed{seed}", seed + 10 * i) for seed in range(SEEDS)]
        for i, arm in enumerate(("none", "ngram"))
    }


def judge(arms: dict[str, list[Path]]):
    return compare_arms(*([load_run(path, arm) for path in paths] for arm, paths in arms.items()), Criteria())


def undecided(arms: dict[str, list[Path]]) -> str:
    result = judge(arms)
    assert (result.word, result.tests) == ("undecided", [])
    assert result.reason == result.obstacles[0]
    return result.reason


def test_whole_runs_are_judged(arms):
    """The negative control: without the flaws of the other tests the verdict is "equivalent" or "identical"."""
    result = judge(arms)
    assert (result.word, result.obstacles) == ("equivalent", [])
    assert [test.quantity for test in result.tests] == ["reward", "accuracy", "response_length"]


@pytest.mark.parametrize("seeds", [1, 3])
def test_whole_identical_runs_are_identical(tmp_path, seeds):
    folders = {arm: [write_run(tmp_path / arm / f"seed{s}", s) for s in range(seeds)] for arm in ("none", "ngram")}
    assert judge(folders).word == "identical"


def test_identity_says_which_runs_it_leaves_out(tmp_path):
    folders = {"none": [write_run(tmp_path / "none" / f"seed{s}", s) for s in range(3)]}
    folders["ngram"] = [write_run(tmp_path / "ngram" / "seed1", 1)]
    result = judge(folders)
    assert (result.word, result.unpaired) == ("identical", 2)
    assert "identical over 65 steps (metrics, no tokens to compare), 2 runs without a partner" in sentence(result)


def test_a_collapse_is_not_hidden_behind_a_killed_run(arms):
    """Reward falls by 0.4 from step 5 on; one run was killed at step 4, so that only steps 1 to 4 are common."""
    for path in arms["ngram"]:
        edit(path, REWARD, range(5, STEPS + 1), 0.1)
    write_lines(arms["ngram"][1], read_lines(arms["ngram"][1])[:5])
    (arms["ngram"][1] / "run.json").write_text(json.dumps({"seed": 1, "finished": False}))
    assert undecided(arms) == "run ngram-seed1 did not finish: it stopped at step 4 of 64"


@pytest.mark.parametrize("value", [None, float("inf"), -1e200])
def test_a_diverged_arm_is_not_judged_by_the_steps_before(arms, value):
    for path in arms["ngram"]:
        edit(path, REWARD, range(33, STEPS + 1), value)
    assert undecided(arms) == "reward of run ngram-seed0 is NaN or infinite from step 33 on"


def test_single_and_scattered_nan_are_named(arms):
    edit(arms["none"][2], LENGTH, [7], None)
    assert undecided(arms) == "response length of run none-seed2 is NaN or infinite at step 7"
    edit(arms["none"][2], LENGTH, [9, 20], None)
    assert undecided(arms) == "response length of run none-seed2 is NaN or infinite at step 7 and 2 more"
    edit(arms["none"][0], ACCURACY, [64], None)
    assert undecided(arms) == "accuracy of run none-seed0 is NaN or infinite at step 64"


def test_runs_of_other_lengths_on_purpose(arms, tmp_path):
    arms["none"] = [write_run(tmp_path / f"short-seed{seed}", seed, steps=32) for seed in range(SEEDS)]
    reason = "run short-seed0 ends with step 32, run ngram-seed0 with 64: only runs of equal length are judged"
    assert undecided(arms) == reason


def test_missing_steps_and_metrics_are_named(arms):
    lines = read_lines(arms["ngram"][0])
    write_lines(arms["ngram"][0], lines[:20] + lines[22:])
    assert undecided(arms) == "run ngram-seed0 lacks step 20 and 1 more, which run none-seed0 has"
    write_lines(arms["ngram"][0], lines)
    edit(arms["ngram"][0], REWARD, range(40, 65), "absent")
    reason = "run ngram-seed0 ends with reward at step 39, run none-seed0 with 64: only runs of equal length are judged"
    assert undecided(arms) == reason
    edit(arms["ngram"][0], REWARD, range(65), "absent")
    assert undecided(arms) == "run ngram-seed0 logged no reward, run none-seed0 did"
    write_lines(arms["ngram"][0], lines)
    edit(arms["ngram"][0], "val-core/math/acc/mean@1", [64], 0.5)
    assert "measure accuracy by different metrics" in undecided(arms)


def test_a_run_that_was_killed_and_resumed_is_whole(arms):
    """It validates where it goes on, at a step at which the others do not; its last validation must be there."""
    for path in arms["ngram"]:
        edit(path, ACCURACY, [24], 0.2)
    assert judge(arms).word == "equivalent"
    edit(arms["ngram"][0], ACCURACY, [64], "absent")
    assert "run ngram-seed0 ends with accuracy at step 48" in undecided(arms)


def test_seeds_of_an_arm_must_differ(arms):
    (arms["ngram"][2] / "run.json").write_text(json.dumps({"seed": 10, "finished": True}))
    assert undecided(arms) == "two runs of arm ngram have seed 10: run ngram-seed0 and run ngram-seed2"


@pytest.mark.parametrize("relabeled", [False, True])
def test_copies_are_not_runs(tmp_path, relabeled):
    """Two copies of one seed per arm have no spread, so that any difference has p = 0."""
    arms = {}
    for arm, level in (("none", 0.0), ("ngram", 0.021)):
        original = write_run(tmp_path / f"{arm}-seed0", 5, level=level)
        copy = Path(shutil.copytree(original, tmp_path / f"{arm}-seed1"))
        if relabeled:
            (copy / "run.json").write_text(json.dumps({"seed": 6, "finished": True}))
        arms[arm] = [original, copy]
    assert undecided(arms) == "run none-seed0 and run none-seed1 are copies: equal to the last bit, times included"


def test_a_seed_that_changed_nothing_is_no_second_run(tmp_path):
    """Equal metrics at other speeds: not copies, but one training, run twice and labeled as two seeds."""
    arms = {arm: [write_run(tmp_path / f"{arm}-seed{s}", 5) for s in range(2)] for arm in ("none", "ngram")}
    for paths in arms.values():
        (paths[1] / "run.json").write_text(json.dumps({"seed": 6, "finished": True}))
    reason = "run none-seed0 and run none-seed1 of arm none trained the same to the last bit: they do not count twice"
    assert undecided(arms) == reason


def test_a_run_against_itself_or_its_copy_is_not_identical(arms, tmp_path):
    path = arms["none"][0]
    assert undecided({"a": [path], "b": [path]}) == f"run {path} is given twice"
    (tmp_path / "link").symlink_to(path)
    assert undecided({"a": [path], "b": [tmp_path / "link"]}).endswith("is given twice")
    copy = Path(shutil.copytree(path, tmp_path / "copy"))
    assert "are copies" in undecided({"a": [path], "b": [copy]})


def test_unfinished_runs_are_not_identical(tmp_path):
    a, b = (write_run(tmp_path / name, 0, steps=20, finished=False) for name in "ab")
    assert undecided({"a": [a], "b": [b]}) == "run a did not finish: it stopped at step 20"
    assert judge({"a": [a], "b": [b]}).identities[0].last_identical_step == 20


def test_a_run_that_does_not_say_whether_it_finished(tmp_path):
    a, b = write_run(tmp_path / "a", 0), write_run(tmp_path / "b", 0, finished=None)
    reason = undecided({"a": [a], "b": [b]})
    assert reason.startswith("run b does not say whether it finished (it has step 64)")
    (b / "run.json").write_text('{"finished": true}')  # as the reason tells
    assert judge({"a": [a], "b": [b]}).word == "identical"


def test_token_files_that_end_early_are_not_identical(tmp_path):
    folders = {}
    for arm, last in (("none", STEPS), ("ngram", 40)):
        folders[arm] = [write_run(tmp_path / arm, 0)]
        for step in range(1, last + 1):
            save_tokens(folders[arm][0] / "tokens" / f"{step}.npz", ["p"], [0], [5], [[step]])
    reason = "run ngram ends with token file of step 40, run none with 64: only runs of equal length are judged"
    assert undecided(folders) == reason
    shutil.rmtree(folders["ngram"][0] / "tokens")
    assert judge(folders).word == "identical"  # by metrics: one side keeps no tokens


def test_exit_code_and_report_tell_the_obstacle(arms, tmp_path, capsys):
    sources = [str(path) for paths in arms.values() for path in paths]
    options = ["--out", str(tmp_path / "out"), "--fail-on-difference"]
    assert main([*sources, *options]) == 0
    assert "equivalent" in capsys.readouterr().out
    edit(arms["ngram"][1], REWARD, range(33, 65), None)
    assert main([*sources, *options]) == 3
    printed = capsys.readouterr().out
    reason = "reward of run ngram-seed1 is NaN or infinite from step 33 on"
    assert f"ngram vs none: undecided: {reason}" in printed
    assert f"No verdict can be given on these runs:\n- {reason}\n" in printed
    (saved,) = json.loads((tmp_path / "out" / "compare.json").read_text())["comparisons"]
    assert (saved["word"], saved["obstacles"], saved["tests"]) == ("undecided", [reason], [])
