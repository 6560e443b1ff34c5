"""Killed, resumed and interrupted runs: the same final weights, and no process left behind."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch

from .conftest import STEPS, TIMEOUT_S, Run, marked_processes
from .test_training import probs_diff, tokens, trained, weights

SOAK = int(os.environ.get("RL_ACCEL_SOAK", "1"))


def wait_for_text(path, text, process):
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(FileNotFoundError):  # it may be renamed at any moment
            if text in path.read_text():
                return
        time.sleep(0.01)
    raise AssertionError(f"{text!r} is not in {path}; exit status {process.poll()}")


def wait_for_end_of(mark, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and marked_processes(mark):
        time.sleep(0.5)
    return marked_processes(mark)


def assert_same_run(resumed, plain_run):
    """Every step is there once and is that of a run that nobody disturbed; so are the final weights."""
    assert sorted(resumed.metrics()) == list(range(1, STEPS + 1))
    assert tokens(resumed) == tokens(plain_run)
    assert trained(resumed.metrics()[STEPS]) == trained(plain_run.metrics()[STEPS])
    assert probs_diff(resumed.metrics()[STEPS]) == pytest.approx(probs_diff(plain_run.metrics()[STEPS]), abs=1e-5)
    expected, found = weights(plain_run.path), weights(resumed.path)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_killed_runs_resume_to_the_same_weights(trainings, plain_run):
    """`RL_ACCEL_SOAK` is the number of kills. The first falls between a checkpoint and the log line of its step, in a
    run that saves every second step; the others at random moments of runs that save every step, so in saves too.

    Every other kill takes all processes at once, the rest the driver alone; the wall clock jumps in each session.
    """
    moments = random.Random(0)
    kills: list[str] = []
    while len(kills) < SOAK:
        name, first = f"killed-{len(kills)}", not kills
        settings = ("trainer.save_freq=2" if first else "trainer.save_freq=1",)
        checkpoint = 0
        while len(kills) < SOAK:
            process, path, mark = trainings.start(name, *settings, env=jumping_clock(moments))
            latest = path / "checkpoints" / "latest_checkpointed_iteration.txt"
            if first:
                wait_for_text(latest.with_name(f"{latest.name}.pending"), "4", process)
            else:
                wait_at_random(moments, path, process)
            if process.poll() == 0:
                break
            assert process.returncode is None, (trainings.root / f"{name}.log").read_text()[-3000:]
            for victim in marked_processes(mark) if len(kills) % 2 else [process]:
                with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                    victim.send_signal(signal.SIGKILL)
            process.wait()
            assert not wait_for_end_of(mark, 60), "processes outlive a killed run"
            found = int(latest.read_text()) if latest.exists() else 0
            assert found >= checkpoint, "a checkpoint was lost"
            checkpoint = found
            if first:
                assert checkpoint == 2
            kills.append(f"{name} at step {checkpoint}")
            print(f"kill {len(kills)} of {SOAK}: {kills[-1]}", flush=True)
            if first:
                break
        resumed = trainings.run(name, *settings) if process.returncode else Run(path, "", 0)
        assert_same_run(resumed, plain_run)
        text = (trainings.root / f"{name}.log").read_text()
        assert "Traceback" not in text, text[-3000:]


def wait_at_random(moments, path, process):
    """Wait for a moment of the run, or for its end; most of a session is its start, most moments are in its steps."""
    metrics = path / "metrics.jsonl"
    if moments.random() < 0.8:
        seen = metrics.read_text().count("\n") if metrics.exists() else 0
        wait_for_lines(metrics, seen + moments.randint(1, 2), process)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(moments.random() * (3 if moments.random() < 0.8 else 30))


def jumping_clock(moments):
    """Environment in which `time.time` of every Python process jumps by up to a day, once every few seconds."""
    return {"PYTHONPATH": str(Path(__file__).parent / "jumping_clock"), "JUMP_SEED": str(moments.randint(0, 10**6))}


def wait_for_lines(path, number, process):
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_text().count("\n") >= number:
            return
        time.sleep(0.02)


def test_ctrl_c_leaves_no_process(trainings):
    process, path, mark = trainings.start("interrupted", "trainer.total_training_steps=500", "trainer.save_freq=-1")
    try:
        wait_for_text(path / "metrics.jsonl", '"step":1,', process)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
    finally:
        process.kill()
    assert not wait_for_end_of(mark, 30)
    assert "Traceback" not in (trainings.root / "interrupted.log").read_text()
