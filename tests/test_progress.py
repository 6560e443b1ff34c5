"""The progress display: it follows a real file through all that happens to it, and never reaches the run."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rl_accel.progress import Progress
from rl_accel.run_folder import RunFolder
from rl_accel.train import _summarize

REWARD = "critic/score/mean"


def record(step: int, **data) -> bytes:
    return json.dumps({"step": step, "data": data}).encode() + b"\n"


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def shown(capsys, text: str, seen: list[str]) -> bool:
    seen.append(capsys.readouterr().out)
    return text in "".join(seen)


@pytest.mark.parametrize(
    "damage",
    [
        record(1, **{REWARD: None, "response_length/mean": None, "val-core/x/acc/mean@1": None}),
        record(1, **{REWARD: "high", "timing_s/gen": [1], "timing_s/step": {}}),
        b'{"step": 1, "data": {"critic/score/me\n',
        b'{"step": 1, "data": {"critic' + record(1, **{REWARD: 0.5}),
        b"\xff\xfe\x00\n",
        b"[" * 100_000 + b"\n",
        b'{"step": "1", "data": {}}\n',
        b'{"step": 1}\n\n\n',
        b"null\n5\n[]\n",
    ],
    ids=["null", "types", "torn", "torn and continued", "bytes", "nesting", "step", "keys", "values"],
)
def test_later_steps_are_shown_after_a_line_that_cannot_be(tmp_path, capsys, damage):
    path = tmp_path / "metrics.jsonl"
    progress, seen = Progress(path, total_steps=3, poll_s=0.01), []
    append(path, damage)
    time.sleep(0.05)
    append(path, record(2, **{REWARD: 0.25, "response_length/mean": 90.4}))
    wait_for(lambda: shown(capsys, "step 2: reward 0.250  len 90", seen))
    append(path, record(3, **{REWARD: 0.75}))
    progress.close()
    assert shown(capsys, "step 3: reward 0.750", seen)
    assert "".join(seen).count("progress: ") <= 1


def test_a_metric_that_is_not_a_number_is_shown_as_such(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    progress = Progress(path, total_steps=None, poll_s=0.01)
    append(path, record(1, **{REWARD: None, "timing_s/gen": 2.0}))
    progress.close()
    assert "step 1: reward nan  rollout 2.00" in capsys.readouterr().out


def test_a_resumed_run_is_shown_from_where_it_goes_on(tmp_path, capsys):
    """verl's logger writes the whole lines anew, over the torn one that the killed run left: the file shrinks."""
    path = tmp_path / "metrics.jsonl"
    kept = record(1, **{REWARD: 0.1}) + record(2, **{REWARD: 0.2})
    path.write_bytes(kept + b'{"step": 3, "data": {"critic/score/mean": 0.3, "actor/entropy": 0.07, "actor/')
    progress, seen = Progress(path, total_steps=4, poll_s=0.01), []
    path.write_bytes(b"")
    time.sleep(0.05)
    path.write_bytes(kept)
    append(path, record(3, **{REWARD: 0.4}))
    wait_for(lambda: shown(capsys, "step 3: reward 0.400", seen))
    progress.close()
    assert "step 2" not in "".join(seen)


class GoneError(OSError):
    """The terminal is gone."""


class ClosedTerminal:
    """What is left of a terminal that was closed: every write fails."""

    encoding = "utf-8"

    def write(self, text: str) -> None:
        raise GoneError("closed")

    def flush(self) -> None:
        raise GoneError("closed")


def test_a_closed_terminal_ends_the_display_and_not_the_run(tmp_path, monkeypatch, caplog):
    path = tmp_path / "metrics.jsonl"
    progress = Progress(path, total_steps=2, poll_s=0.01)
    monkeypatch.setattr(sys, "stdout", ClosedTerminal())
    with caplog.at_level(logging.WARNING, logger="rl_accel"):
        append(path, record(1, **{REWARD: 0.1}))
        wait_for(lambda: "the progress display ended, the run goes on" in caplog.text)
        append(path, record(2, **{REWARD: 0.2}))
        progress.close()


SHOW_ONE_STEP = """
import sys
from pathlib import Path
from rl_accel.progress import Progress
progress = Progress(Path(sys.argv[1]), 1)
Path(sys.argv[1]).write_text('{"step": 1, "data": {"training/rollout_probs_diff_max": 1e-6}}\\n')
progress.close()
"""


def test_a_terminal_of_few_letters_shows_question_marks(tmp_path):
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", SHOW_ONE_STEP, str(tmp_path / "metrics.jsonl")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)
    assert "step 1: |?p| 1.0e-06" in done.stdout


@pytest.mark.parametrize(
    ("metrics", "drawn"),
    [
        (record(1, **{REWARD: None, "timing_s/gen": 3.0}) + record(2, **{REWARD: None}), True),
        (record(1, **{REWARD: 1e308, "timing_s/gen": -1e308}) + record(2, **{REWARD: -1e308}), False),
        (record(1, **{REWARD: None}), False),
        (b"not json\n" + record(2, **{REWARD: 0.1}), False),
        (b"", False),
        (None, False),
    ],
    ids=["NaN", "huge", "only NaN", "damaged", "empty", "no file"],
)
def test_no_metric_fails_a_run_that_finished(tmp_path, caplog, metrics, drawn):
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_bytes(metrics)
    with caplog.at_level(logging.INFO, logger="rl_accel"):
        _summarize(RunFolder(tmp_path), 1.0)
    assert (tmp_path / "curves.png").exists() == drawn
    assert ("no curves.png" in caplog.text) == (not drawn)
    assert "finished in 1 s" in caplog.text
