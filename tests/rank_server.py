"""Ranks of a test script, forked from one process that has imported the script and its hosts: importing DeepSpeed or
verl takes longer than what most ranks do.

    python rank_server.py SCRIPT        # then a launch per line on its input, exit codes per line on its output

A launch is `{"world_size": N, "args": [...], "env": {...}, "folder": ..., "timeout": seconds}`; each rank runs `main()`
of the script with its arguments in `sys.argv`, the variables of `torch.distributed`, `RESULT` (a file that is its own)
and a log of its own. The server starts no thread and no process group, so that a fork finds nothing half done.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TextIO


def load(script: Path):
    sys.path.insert(0, str(script.parent))  # as for a script that is run, and for the processes that it starts
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(script.parent), os.environ.get("PYTHONPATH")]))
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_rank(module, script: Path, launch: dict, rank: int) -> None:
    """Be one rank; does not return."""
    code = 1
    try:
        log = os.open(Path(launch["folder"]) / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(log, stream)
        size = str(launch["world_size"])
        os.environ.update(launch["env"])
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size})
        os.environ["RESULT"] = str(Path(launch["folder"]) / f"{rank}.pt")
        sys.argv = [str(script), *launch["args"]]
        module.main()
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait_for(pids: list[int], seconds: float) -> list[int | None]:
    """Wait for all; returns exit codes, None for those that had to be killed after the time."""
    codes: dict[int, int | None] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in pids:
            if pid in codes:
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                codes[pid] = None
        time.sleep(0.02)
    return [codes[pid] for pid in pids]


def serve(script: Path, answers: TextIO) -> None:
    module = load(script)
    gc.freeze()  # a collection in a rank passes over what was imported: a quarter of a second each
    for line in sys.stdin:
        launch = json.loads(line)
        pids = []
        for rank in range(launch["world_size"]):
            pid = os.fork()
            if pid == 0:
                run_rank(module, script, launch, rank)
            pids.append(pid)
        answers.write(json.dumps(wait_for(pids, launch["timeout"])) + "\n")
        answers.flush()


if __name__ == "__main__":
    to_caller = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the imports print is no answer
    serve(Path(sys.argv[1]), to_caller)
