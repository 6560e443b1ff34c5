"""Fixtures of all tests, what takes how long, and what runs beside what.

`tests/durations.json` has the seconds of every module, of the last run with `--record-durations` (the machine quiet).
`--quick` leaves out what starts engines, trainings or many processes: the tests that share a training, and the modules
above `QUICK_S` in that list.
With `-n` (scripts/test.sh) tests run in processes side by side: those of a module in one, the longest module first, and
what shares a training in the same one, so that no training is done twice.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

DURATIONS = Path(__file__).with_name("durations.json")
QUICK_S = 22.0
TRAININGS = "trainings"
SHARED_TRAININGS = (
    "hosts/verl/soak_kills.py",
    "hosts/verl/test_agent_loop.py",
    "hosts/verl/test_das_training.py",
    "hosts/verl/test_deepspeed_training.py",
    "hosts/verl/test_drop_in.py",
    "hosts/verl/test_interruption.py",
    "hosts/verl/test_lookahead_training.py",
    "hosts/verl/test_reuse.py",
    "hosts/verl/test_training.py",
)
"""Modules that use the trainings `*_run` of hosts/verl/conftest.py, which are fixtures of one process."""
_seconds: dict[str, float] = {}


def pytest_addoption(parser) -> None:
    parser.addoption("--quick", action="store_true", help="leave out what starts engines and trainings")
    parser.addoption("--record-durations", action="store_true", help=f"write {DURATIONS.name}; for runs of all tests")


def pytest_collection_modifyitems(config, items) -> None:
    seconds = json.loads(DURATIONS.read_text())
    for item in items:
        if _shares_training(item) and _module(item.nodeid) not in SHARED_TRAININGS:
            raise pytest.UsageError(f"{item.nodeid} shares a training: add its module to SHARED_TRAININGS")
    if config.getoption("--quick"):
        slow = {item for item in items if _shares_training(item) or seconds.get(_module(item.nodeid), 0.0) > QUICK_S}
        config.hook.pytest_deselected(items=list(slow))
        items[:] = [item for item in items if item not in slow]
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: (_group(item.nodeid) != TRAININGS, -seconds.get(_module(item.nodeid), 0.0)))


def pytest_xdist_make_scheduler(config, log):
    """Give each process a group of tests at a time, in the order above."""
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    config.option.loadscopereorder = False
    return GroupScheduling(config, log)


def _shares_training(item) -> bool:
    return "trainings" in item.fixturenames and any(name.endswith("_run") for name in item.fixturenames)


def _group(nodeid: str) -> str:
    """What has to run in one process."""
    module = _module(nodeid)
    return TRAININGS if module in SHARED_TRAININGS else module


def pytest_runtest_logreport(report) -> None:
    module = _module(report.nodeid)
    _seconds[module] = _seconds.get(module, 0.0) + report.duration


def pytest_sessionfinish(session) -> None:
    if session.config.getoption("--record-durations") and not hasattr(session.config, "workerinput"):
        ordered = sorted(_seconds.items(), key=lambda item: -item[1])
        DURATIONS.write_text(json.dumps({name: round(seconds, 1) for name, seconds in ordered}, indent=1) + "\n")


def _module(nodeid: str) -> str:
    return nodeid.split("::")[0].removeprefix("tests/")


class RankFailedError(AssertionError):
    """A rank of a multi-process test ended with an error or did not end."""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def rank_servers():
    """Script -> the process that forks its ranks (`rank_server.py`), started once."""
    servers: dict[Path, subprocess.Popen] = {}

    def server(script: Path) -> subprocess.Popen:
        if script not in servers:
            servers[script] = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("rank_server.py")), str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            )
        return servers[script]

    yield server
    for process in servers.values():
        process.stdin.close()
        process.wait(60)


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory, rank_servers):
    """Run `main()` of a script as several gloo ranks, real processes; returns what each saved at `$RESULT`."""

    def run(script: Path, world_size: int, *args: str, timeout: float = 240, expect_failure: bool = False, **env: str):
        folder = tmp_path_factory.mktemp("ranks")
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        launch = {"world_size": world_size, "args": args, "env": env, "folder": str(folder), "timeout": timeout}
        server = rank_servers(script)
        server.stdin.write(json.dumps(launch) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, f"{script} could not be imported; see above"
        codes = json.loads(answer)
        if None in codes:
            raise RankFailedError(f"ranks still running after {timeout} s\n{_logs(folder)}")
        if expect_failure:
            return codes, _logs(folder)
        if any(codes):
            raise RankFailedError(f"exit codes {codes}\n{_logs(folder)}")
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]

    return run


def _logs(folder: Path) -> str:
    return "\n".join(f"--- rank {log.stem}\n{log.read_text()[-6000:]}" for log in sorted(folder.glob("*.log")))
