"""Reading runs: verl's metrics file as crashes leave it, wandb files, names of arms."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rl_accel.compare.runs import group_arms, load_run, load_runs
from rl_accel.errors import CompareError


def line(step: int, **data) -> str:
    return json.dumps({"step": step, "data": data}) + "\n"


def write(directory: Path, text: str, **info) -> Path:
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text(text)
    if info:
        (directory / "run.json").write_text(json.dumps(info))
    return directory


def test_metrics_seed_and_arm(tmp_path):
    text = line(0, **{"val-core/gsm8k/acc/mean@1": 0.1}) + line(1, **{"critic/score/mean": 0.25})
    run = load_run(write(tmp_path / "a", text, arm="ngram", seed=3))
    assert (run.arm, run.seed, run.name, run.tokens_dir, run.finished) == ("ngram", 3, "a", None, None)
    for finished in (True, False):
        assert load_run(write(tmp_path / f"{finished}", text, finished=finished)).finished is finished
    assert (run.series("reward"), run.series("accuracy"), run.series("step_s")) == ({1: 0.25}, {0: 0.1}, {})


def test_torn_last_line_is_left_out_and_torn_inner_line_is_an_error(tmp_path):
    whole = line(1, a=1.0) + line(2, a=2.0)
    assert load_run(write(tmp_path / "torn", whole[:-9])).metrics == {"a": {1: 1.0}}
    with pytest.raises(CompareError, match="line 2"):
        load_run(write(tmp_path / "inner", line(1, a=1.0) + '{"step": 2, "da\n' + line(3, a=1.0)))


def test_run_resumed_behind_a_torn_line(tmp_path):
    resumed = '{"step":2,"data":{"a":2.5}}\n'  # as orjson writes it
    run = load_run(write(tmp_path / "a", line(1, a=1.0) + '{"step":2,"data":{"a"' + resumed))
    assert run.metrics == {"a": {1: 1.0, 2: 2.5}}


def test_last_of_repeated_steps_wins_and_validation_on_resume_keeps_the_rest(tmp_path):
    text = line(1, a=1.0) + line(2, a=2.0, b=1.0) + line(3, a=3.0) + line(2, val=0.5) + line(3, a=30.0)
    assert load_run(write(tmp_path / "a", text)).metrics == {
        "a": {1: 1.0, 2: 2.0, 3: 30.0},
        "b": {2: 1.0},
        "val": {2: 0.5},
    }


def test_null_is_nan_and_series_leave_it_out(tmp_path):
    run = load_run(write(tmp_path / "a", line(1, **{"critic/score/mean": None, "text": "x"}) + line(2, a=1)))
    assert math.isnan(run.metrics["critic/score/mean"][1])
    assert run.series("reward") == {}
    assert "text" not in run.metrics


def test_accuracy_prefers_acc_and_averages_data_sets(tmp_path):
    acc = {"val-core/gsm8k/acc/mean@1": 0.2, "val-core/org/math/acc/mean@4": 0.4}
    text = line(0, **acc, **{"val-core/gsm8k/reward/mean@1": 0.9}) + line(5, **{"val-core/gsm8k/acc/mean@1": 1.0})
    assert load_run(write(tmp_path / "a", text)).series("accuracy") == {0: pytest.approx(0.3)}
    reward_only = line(0, **{"val-core/gsm8k/reward/mean@1": 0.9, "val-core/gsm8k/reward/best@4": 1.0})
    assert load_run(write(tmp_path / "b", reward_only)).series("accuracy") == {0: 0.9}


def test_arms_in_order_by_run_json_else_folder_else_apart(tmp_path):
    text = line(1, a=1.0)
    named = [write(tmp_path / "x", text, arm="suffix", seed=0), write(tmp_path / "none-seed1", text)]
    runs = load_runs([*named, write(tmp_path / "none-seed2", text)])
    assert {arm: [run.seed for run in members] for arm, members in group_arms(runs).items()} == {
        "suffix": [0],
        "none": [1, 2],
    }
    same = [write(tmp_path / parent / name, text, arm="none") for parent, name in (("1", "kv"), ("1", "plain"))]
    assert list(group_arms(load_runs(same))) == ["kv", "plain"]
    same.append(write(tmp_path / "2" / "kv", text, arm="none"))
    assert list(group_arms(load_runs(same))) == [str(path) for path in same]


@pytest.mark.parametrize("source", ["nowhere", "no/such", "nul\0", "long" * 2000])
def test_unknown_run_is_an_error(source):
    with pytest.raises(CompareError, match=r"no such run folder|is not a run"):
        load_run(source)


def test_empty_and_strange_folders_are_errors(tmp_path):
    with pytest.raises(CompareError, match="no metrics yet"):
        load_run(write(tmp_path / "empty", ""))
    (tmp_path / "other").mkdir()
    with pytest.raises(CompareError, match=r"expected metrics\.jsonl or one run-"):
        load_run(tmp_path / "other")
    broken = write(tmp_path / "broken", line(1, a=1.0))
    (broken / "run.json").write_text("{")
    with pytest.raises(CompareError, match="is not a JSON object"):
        load_run(broken)


def test_online_run_without_login_is_a_clear_error(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(CompareError, match=r"cannot be read.*wandb login"):
        load_run("someone/project/abc123")


LOG_WITH_WANDB = """
import json, sys, wandb
run = wandb.init(project="p", name="ngram-seed4", dir=sys.argv[1])
for step, data in enumerate(json.load(open(sys.argv[2]))):
    run.log(data, step=step)
run.finish()
failed = wandb.init(project="p", name="failed", dir=sys.argv[1] + "/failed")
failed.log({"critic/score/mean": 1}, step=0)
failed.finish(exit_code=1)
"""


@pytest.fixture(scope="module")
def wandb_run(tmp_path_factory) -> tuple[Path, list[dict]]:
    """A real offline run, long enough (about 100 KiB) for records that cross wandb's 32 KiB blocks."""
    folder = tmp_path_factory.mktemp("wandb")
    rows = [
        {
            "critic/score/mean": step / 3,
            "timing_s/gen": 1e-9 * step,
            "nan": math.nan,
            **{f"m/{i}": i + step / 7 for i in range(30)},
        }
        for step in range(120)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "failed").mkdir()
    environment = {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
    }
    command = [sys.executable, "-c", LOG_WITH_WANDB, str(folder), str(folder / "rows.json")]
    subprocess.run(command, check=True, env=environment, timeout=120)
    (run_dir,) = (folder / "wandb").glob("offline-run-*")
    return run_dir, rows


def test_wandb_offline_run_is_read_back_equal(wandb_run):
    run_dir, rows = wandb_run
    (file,) = run_dir.glob("*.wandb")
    assert file.stat().st_size > 3 * 32768
    for source in (run_dir, file):
        run = load_run(source)
        assert (run.arm, run.seed, run.finished) == ("ngram", 4, True)
        assert set(run.metrics) == set(rows[0])
        for key in rows[0]:
            expected = {step: row[key] for step, row in enumerate(rows)}
            assert run.metrics[key] == pytest.approx(expected, rel=0, abs=0, nan_ok=True)


def test_a_wandb_run_that_failed_did_not_finish(wandb_run):
    (failed,) = (wandb_run[0].parents[1] / "failed" / "wandb").glob("offline-run-*")
    assert (load_run(failed).name, load_run(failed).finished) == ("failed", False)


def test_torn_wandb_file_keeps_its_head_and_a_damaged_one_is_an_error(wandb_run, tmp_path):
    run_dir, _ = wandb_run
    copy = Path(shutil.copy(next(run_dir.glob("*.wandb")), tmp_path / "run-x.wandb"))
    whole = copy.read_bytes()
    copy.write_bytes(whole[: len(whole) // 2])
    assert load_run(copy).finished is False
    steps = load_run(copy).metrics["critic/score/mean"]
    assert list(steps) == list(range(len(steps)))
    assert 30 < len(steps) < 90
    middle = len(whole) // 2
    copy.write_bytes(whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :])
    with pytest.raises(CompareError, match="checksum"):
        load_run(copy)
    copy.write_bytes(b"not wandb")
    with pytest.raises(CompareError, match="not a wandb file"):
        load_run(copy)
