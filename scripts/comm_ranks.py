"""Ranks of a training run as plain processes that do what a driver orders, for benchmarks of communication.

The driver writes orders to a rank's standard input and reads its answers from its standard output, JSON by line, so
ranks that wait do not use the network. What a rank prints goes to a file without a name, shown if it fails. Ranks that
lose their driver end.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slow_network import INTERFACE, SlowNetwork

SHOWN_LINES = 20


class RankError(Exception):
    """A rank failed; the message holds the last lines it printed."""


class Ranks:
    """`num_nodes` times `ranks_per_node` processes of one script. Use as a context manager.

    Args:
        command: script and options of a rank.
        network: where the nodes are; None: all on this machine's loopback.
        env: variables beside those of torch.distributed.
    """

    def __init__(
        self,
        command: list[str],
        num_nodes: int,
        ranks_per_node: int,
        network: SlowNetwork | None = None,
        env: dict[str, str] | None = None,
    ):
        world_size = num_nodes * ranks_per_node
        shared = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # DeepSpeed calls ninja
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(ranks_per_node),
            "MASTER_ADDR": network.address(0) if network else "127.0.0.1",
            "MASTER_PORT": "29500" if network else str(_free_port()),
            "GLOO_SOCKET_IFNAME": INTERFACE if network else "lo",
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            **(env or {}),
        }
        self._processes: list[subprocess.Popen] = []
        self._logs = []
        for rank in range(world_size):
            node, place = divmod(rank, ranks_per_node)
            log = tempfile.TemporaryFile("w+")  # noqa: SIM115
            self._logs.append(log)
            self._processes.append(
                subprocess.Popen(
                    [*(network.command(node) if network else []), sys.executable, *command],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env={**shared, "RANK": str(rank), "LOCAL_RANK": str(place), "GROUP_RANK": str(node)},
                )
            )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close(at_once=exception[0] is not None)

    def order(self, timeout_s: float = 1800.0, **order: Any) -> list[Any]:
        """Send all ranks an order; returns their answers by rank.

        Raises:
            RankError: if a rank ended or did not answer in time.
        """
        line = json.dumps(order) + "\n"
        late = threading.Timer(timeout_s, self._signal, [signal.SIGABRT])
        late.start()
        try:
            for process in self._processes:
                process.stdin.write(line)
                process.stdin.flush()
            return [self._answer(rank) for rank in range(len(self._processes))]
        except BrokenPipeError:
            raise self._failure() from None
        finally:
            late.cancel()

    def _answer(self, rank: int) -> Any:
        line = self._processes[rank].stdout.readline()
        if not line:
            raise self._failure()
        return json.loads(line)

    def _failure(self) -> RankError:
        """The error of the rank that failed first of its own: others only lose their connections to it."""
        for process in self._processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                continue
        texts = []
        for rank, (process, log) in enumerate(zip(self._processes, self._logs, strict=True)):
            log.seek(0)
            lines = log.read().splitlines()
            lost = any(word in line for line in lines for word in ("Connection closed by peer", "Connection reset"))
            texts.append((process.returncode in (0, None), lost, rank, lines))
        _, _, rank, lines = min(texts)
        code = self._processes[rank].returncode
        state = "did not answer in time" if code is None else f"ended with code {code}"
        return RankError(f"rank {rank} {state}:\n" + "\n".join(lines[-SHOWN_LINES:]))

    def close(self, at_once: bool = False) -> None:
        """End the ranks: those that wait for orders by themselves, others by force."""
        if at_once:
            self._signal(signal.SIGKILL)
        for process in self._processes:
            try:
                process.stdin.close()
            except BrokenPipeError:
                continue
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        for log in self._logs:
            log.close()

    def _signal(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)


def serve(make: Callable[[], Any]) -> None:
    """A rank's side: answer orders to the end. An order is a dict with `do`, the name of a method of what `make`
    returns, and its arguments."""
    faulthandler.enable()  # a rank that is ended for being late says where it was
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to the log
    rank = make()
    for line in sys.stdin:
        order = json.loads(line)
        answer = getattr(rank, order.pop("do"))(**order)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def end_in_order() -> None:
    """Make SIGTERM end the driver as an exception does, so that context managers clean up."""

    def stop(number: int, frame: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
