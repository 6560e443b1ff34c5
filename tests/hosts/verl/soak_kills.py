"""Many kills at random moments, saves included: `./scripts/soak.sh kills`. About two minutes a kill.

Every other kill takes all processes at once, the rest the driver alone; the wall clock jumps in each session.
`RL_ACCEL_SOAK` is the number of kills.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil

from .trainings import TIMEOUT_S, Run, assert_same_run, latest_checkpoint, marked_processes, wait_for_end_of

NUM_KILLS = int(os.environ.get("RL_ACCEL_SOAK", "1"))
SETTINGS = ("trainer.save_freq=1",)


def test_killed_runs_resume_to_the_same_weights(trainings, plain_run):
    moments = random.Random(0)
    kills = 0
    while kills < NUM_KILLS:
        name, checkpoint, process = f"killed-{kills}", 0, None
        while kills < NUM_KILLS:
            process, path, mark = trainings.start(name, *SETTINGS, env=jumping_clock(moments))
            wait_at_random(moments, path, process)
            if process.poll() == 0:
                break
            assert process.returncode is None, trainings.output(name)[-3000:]
            for victim in marked_processes(mark) if kills % 2 else [process]:
                with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                    victim.send_signal(signal.SIGKILL)
            process.wait()
            assert not wait_for_end_of(mark, 60), "processes outlive a killed run"
            assert latest_checkpoint(path) >= checkpoint, "a checkpoint was lost"
            checkpoint = latest_checkpoint(path)
            kills += 1
            print(f"kill {kills} of {NUM_KILLS}: {name} at step {checkpoint}", flush=True)
        resumed = trainings.run(name, *SETTINGS) if process.returncode else Run(path, "", 0)
        assert_same_run(resumed, plain_run)
        assert "Traceback" not in trainings.output(name)


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
