"""A disk that fills up in the middle of a run: one clear error, nothing lost, and later the run goes on."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys

import pytest

from .conftest import TINY
from .test_interruption import assert_same_run


@pytest.fixture
def small_disk(trainings):
    """A file system of the test's own at the run folder; `resize(mebibytes)`."""
    path = trainings.root / "small-disk"
    path.mkdir()

    def mount(*options):
        return subprocess.run(["mount", *options, str(path)], capture_output=True, text=True, check=False)

    if shutil.which("mount") is None or os.geteuid() != 0 or mount("-t", "tmpfs", "-o", "size=16m", "tmpfs").returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield lambda mebibytes: mount("-o", f"remount,size={mebibytes}m")
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_ends_a_run_with_one_error_and_loses_no_checkpoint(trainings, plain_run, small_disk):
    """The disk holds the first checkpoint (11 MB with the optimizer) and not the second."""
    process, path, _ = trainings.start("small-disk")
    assert process.wait(600) == 1
    text = (trainings.root / "small-disk.log").read_text()
    assert "takes no more" in text and "it goes on from the last checkpoint" in text
    assert "Traceback" not in text
    assert (path / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "2"
    assert small_disk(200).returncode == 0
    assert_same_run(trainings.run("small-disk"), plain_run)


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
