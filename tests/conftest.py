"""Fixtures of all tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch


class RankFailedError(AssertionError):
    """A rank of a multi-process test ended with an error or did not end."""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def run_ranks(tmp_path):
    """Run a script as several gloo ranks, real processes; returns what each rank saved at `$RESULT` (torch.save)."""

    def run(script: Path, world_size: int, *args: str, timeout: float = 240, expect_failure: bool = False, **env: str):
        folder = tmp_path / f"ranks-{time.monotonic_ns()}"
        folder.mkdir()
        common = {**os.environ, "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), **env}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "OMP_NUM_THREADS": "1"}
        common |= {"DS_ACCELERATOR": "cpu"}
        processes = []
        for rank in range(world_size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "RESULT": str(folder / f"{rank}.pt")}
            log = (folder / f"{rank}.log").open("w")
            command = [sys.executable, str(script), *args]
            processes.append(subprocess.Popen(command, env=common | own, stdout=log, stderr=subprocess.STDOUT))
        deadline = time.monotonic() + timeout
        try:
            for process in processes:
                process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise RankFailedError(f"ranks still running after {timeout} s\n{_logs(folder)}") from None
        finally:
            for process in processes:
                process.kill()
                process.wait()
        codes = [process.returncode for process in processes]
        if expect_failure:
            return codes, _logs(folder)
        if any(codes):
            raise RankFailedError(f"exit codes {codes}\n{_logs(folder)}")
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]

    return run


def _logs(folder: Path) -> str:
    return "\n".join(f"--- rank {log.stem}\n{log.read_text()[-6000:]}" for log in sorted(folder.glob("*.log")))
