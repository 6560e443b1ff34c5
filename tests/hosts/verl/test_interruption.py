"""Runs that are killed, interrupted or out of disk: one clear error, no process left, and the same run in the end.

`soak_kills.py` beside this file kills many runs at random moments.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

from .trainings import TINY, assert_same_run


def test_a_run_that_was_disturbed_ends_with_the_same_weights(das_run, plain_run):
    """Drafts, a full disk and a kill later; every step is there once, and equal to the last bit."""
    assert_same_run(das_run.run, plain_run)
    assert "Traceback" not in das_run.run.output


def test_a_kill_between_a_checkpoint_and_its_log_line_loses_no_step(das_run):
    """The checkpoint does not count before its step is logged, and no process outlives the run."""
    assert das_run.killed.checkpoint == 2
    assert not das_run.killed.left


def test_a_full_disk_ends_a_run_with_one_error_and_loses_no_checkpoint(das_run):
    if das_run.disk_full is None:
        pytest.skip("needs the right to mount a file system")
    session = das_run.disk_full
    assert session.returncode == 1
    assert "takes no more" in session.output and "it goes on from the last checkpoint" in session.output
    assert "Traceback" not in session.output
    assert session.checkpoint == 2
    assert not session.left


def test_a_disk_that_is_full_before_the_first_step_is_one_error(tmp_path):
    """Files of up to 8 KB still fit: the run folder is opened, and its config.yaml is the first that does not fit."""
    command = [sys.executable, "-m", "rl_accel.train", "recipe=gsm8k_grpo/cpu", *TINY]
    done = subprocess.run(
        [*command, f"rl_accel.run_dir={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "RL_ACCEL_DEVICE": "cpu"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 10, 8 << 10)),
    )
    assert done.returncode == 1
    assert "could not be prepared: [Errno 27] File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_ctrl_c_leaves_no_process(best_of_run):
    assert best_of_run.run.returncode == 130
    assert not best_of_run.left
    assert "Traceback" not in best_of_run.run.output
