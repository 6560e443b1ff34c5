"""No process is left behind, whatever way a run ends."""

import os
import subprocess
import sys
import time

import psutil

from rl_accel import processes

RUN = """
import subprocess, sys, time
from rl_accel import processes
mark = processes.mark_children()
processes.start_reaper(mark)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


def wait_until_gone(pid, seconds=20.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


def test_a_killed_run_takes_its_processes_along():
    run = subprocess.Popen([sys.executable, "-c", RUN], stdout=subprocess.PIPE, text=True)
    child = int(run.stdout.readline())
    run.kill()
    run.wait()
    assert wait_until_gone(child), "a process of its own session outlived the run"


def test_only_the_processes_with_the_mark_are_ended(monkeypatch):
    monkeypatch.setenv(processes.MARK, "placeholder")
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    stranger = subprocess.Popen(sleeper, env={**os.environ, processes.MARK: "another run"})
    mark = processes.mark_children()
    ours = subprocess.Popen(sleeper)
    try:
        while not processes.survivors(mark):
            time.sleep(0.05)
        assert processes.end_survivors(mark) == 1
        assert wait_until_gone(ours.pid)
        assert stranger.poll() is None
    finally:
        for process in (stranger, ours):
            process.kill()
            process.wait()
