"""Killed, resumed and interrupted runs: the same final weights, and no process left behind."""

from __future__ import annotations

import signal
import time

import torch

from .conftest import STEPS, TIMEOUT_S, marked_processes
from .test_training import tokens, trained, weights


def wait_for_step(path, step, process):
    deadline = time.monotonic() + TIMEOUT_S
    metrics = path / "metrics.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and f'"step":{step},' in metrics.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached; exit status {process.poll()}")


def wait_for_end_of(mark, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and marked_processes(mark):
        time.sleep(0.5)
    return marked_processes(mark)


def test_a_killed_run_resumes_to_the_same_weights(trainings, plain_run):
    process, path, mark = trainings.start("killed")
    wait_for_step(path, 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not wait_for_end_of(mark, 60), "processes outlive a killed run"
    assert (path / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "2"

    resumed = trainings.run("killed")
    assert resumed.path == path
    assert sorted(resumed.metrics()) == list(range(1, STEPS + 1))
    assert tokens(resumed) == tokens(plain_run)
    last = plain_run.metrics()[STEPS]
    assert trained(resumed.metrics()[STEPS]) == trained(last)
    expected, found = weights(plain_run.path), weights(path)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_ctrl_c_leaves_no_process(trainings):
    process, path, mark = trainings.start("interrupted", "trainer.total_training_steps=500", "trainer.save_freq=-1")
    try:
        wait_for_step(path, 1, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
    finally:
        process.kill()
    assert not wait_for_end_of(mark, 30)
    assert "Traceback" not in (trainings.root / "interrupted.log").read_text()
