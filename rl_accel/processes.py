"""No process is left behind: every process of a run carries a mark in its environment and is ended by it.

The run ends its processes itself when it finishes, fails or is interrupted. For the case that it is killed, a reaper, a
small process outside the run, waits for the end of a pipe that only the run holds open and then does the same.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import uuid

import psutil

MARK = "RL_ACCEL_RUN_ID"
GRACE_S = 5.0
PR_SET_PDEATHSIG = 1


def mark_children() -> str:
    """Give this run a mark that every process started from here on inherits; returns it."""
    mark = uuid.uuid4().hex
    os.environ[MARK] = mark
    return mark


def start_reaper(mark: str) -> subprocess.Popen:
    """Start the process that ends what is left of the run should the calling process be killed."""
    env = {name: value for name, value in os.environ.items() if name != MARK}
    return subprocess.Popen(
        [sys.executable, "-m", "rl_accel.processes", mark],
        stdin=subprocess.PIPE,
        env=env,
        start_new_session=True,
    )


def survivors(mark: str) -> list[psutil.Process]:
    """Return the processes of this machine that carry the mark, without the calling one."""
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            continue
    return found


def end_survivors(mark: str) -> int:
    """Terminate, then kill, every process with the mark; returns how many there were."""
    processes = survivors(mark)
    for process in processes:
        _signal(process.terminate)
    _, alive = psutil.wait_procs(processes, timeout=GRACE_S)
    for process in alive:
        _signal(process.kill)
    psutil.wait_procs(alive, timeout=GRACE_S)
    return len(processes)


def end_with_parent(signum: int = signal.SIGKILL) -> None:
    """Have the calling process killed, or sent `signum`, when the one that started it is gone. Linux."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:  # it went before the kernel was told
        os.kill(os.getpid(), signum)


def _signal(send) -> None:
    try:
        send()
    except psutil.NoSuchProcess:
        return


if __name__ == "__main__":
    sys.stdin.read()  # returns when the run is gone
    end_survivors(sys.argv[1])
