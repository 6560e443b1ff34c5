"""A vLLM server of ours, in a process that ends with the one that started it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from rl_accel.errors import NotLiveError
from rl_accel.processes import end_with_parent

GRACE_S = 20.0
LAST_LINES = 15


class Server:
    """`vllm serve` on a free port of this machine."""

    def __init__(
        self, model: str, arguments: Sequence[str], log: Path, host: str = "127.0.0.1", env: Mapping[str, str] = {}
    ):
        """
        Args:
            arguments: of `vllm serve`.
            log: file for what it writes.
            host: address that others reach it at.
            env: variables beside those of this process.
        """
        self.port, self.log = free_port(), log
        self.url = f"http://{host}:{self.port}"
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
        command += ["--host", host, "--port", str(self.port), *arguments]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env={**os.environ, **env}, preexec_fn=end_with_parent,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self, timeout_s: float) -> str:
        """Return its URL when it answers.

        Raises:
            NotLiveError: if it ends, or does not answer in time; with its last lines.
        """
        limit = time.monotonic() + timeout_s
        while time.monotonic() < limit and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return self.url
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        how = "ended" if self._process.poll() is not None else f"did not answer in {timeout_s:.0f} s"
        self.stop()
        raise NotLiveError(f"the draft server {how}; the end of {self.log}:\n{self.last_lines()}")

    def last_lines(self) -> str:
        with self.log.open(encoding="utf-8", errors="replace") as lines:
            return "".join(deque(lines, LAST_LINES))

    def stop(self) -> None:
        """End it; it may have ended."""
        self._process.terminate()
        try:
            self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def free_port() -> int:
    """Return a port of this machine that nobody listens at now."""
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])
