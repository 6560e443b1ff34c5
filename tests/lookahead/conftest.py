"""A real vLLM server on the shipped policy that the tests of lookahead share: exact sampling, and drafts by DAS."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rl_accel.draft.feature import DAS_PROPOSER
from rl_accel.quickstart.deep import POLICY

SETTINGS = {"rl_accel": {"sampling": {"exact": True, "seed": 7}, "draft": {"method": "das"}}}
SPECULATIVE = {"model": DAS_PROPOSER, "num_speculative_tokens": 16}


@pytest.fixture(autouse=True)
def usual_logging(monkeypatch) -> None:
    """What is warned about is heard, whatever hosts that other tests of the process import have made of logging."""
    monkeypatch.setattr(logging.root.manager, "disable", logging.NOTSET)
    monkeypatch.setattr(logging.root, "level", min(logging.root.level, logging.WARNING))
    for handler in logging.root.handlers:  # pytest's, which the import of vLLM's `serve` sets to ERROR
        monkeypatch.setattr(handler, "level", min(handler.level, logging.WARNING))
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if name.split(".")[0] == "rl_accel" and isinstance(logger, logging.Logger):
            for attribute, usual in (("disabled", False), ("level", logging.NOTSET), ("propagate", True)):
                monkeypatch.setattr(logger, attribute, usual)
    logging.root.manager._clear_cache()  # type: ignore[attr-defined]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def serving(command: list[str], port: int, log: Path, **env: str) -> Iterator[str]:
    """Run a server until the block ends; yields its URL when it answers."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **env})
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except urllib.error.HTTPError:
                break  # a proxy answers, whose target does not
            except OSError:
                time.sleep(0.3)
        yield url
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="session")
def url(tmp_path_factory) -> Iterator[str]:
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(POLICY), "--port", str(port),
        "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "320", "--block-size", "32",
        "--max-num-seqs", "32", "--generation-config", "vllm", "--additional-config", json.dumps(SETTINGS),
        "--speculative-config", json.dumps(SPECULATIVE),
    ]  # fmt: skip
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with serving(command, port, tmp_path_factory.mktemp("server") / "log", **env) as found:
        yield found
