"""Nodes with a slow network between them, on one machine: network namespaces, a bridge, a token bucket at both ends of
every link. For benchmarks of communication; needs Linux, root and iproute2.

Every node is a namespace with one interface `v0`, joined by a veth pair to a bridge in a namespace of its own. Ranks of
one node talk over its loopback, without a limit. Rates only: no delay, no loss. Names carry the process id and its
start time, so runs beside each other do not meet, and what a dead run left is known and removed by the next.

Removal is the work of a small process outside the run, whatever way the run ends: it waits for the end of a pipe that
only the run holds open, ends what still lives in the namespaces, and deletes them.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

PREFIX = "rlcomm"
INTERFACE = "v0"
SUBNET = "10.77.0"
QUEUE_MS = 100
"""What a token bucket holds back before it drops."""
BURST_MS = 4
"""Bytes that pass at once, as time at the rate: too few and the bucket is empty between two runs of the kernel."""
MIN_BURST = 16 * 1024
_RATE = re.compile(r"(\d+(?:\.\d+)?)(k|m|g)bit")
_NAME = re.compile(rf"{PREFIX}-(\d+)-(\d+)-(?:bridge|node\d+)")


class NetworkError(Exception):
    """This machine cannot make the network; the message is one line."""


def bits_per_second(rate: str) -> float | None:
    """Return a rate such as `25mbit` in bit/s; None for `none`.

    Raises:
        ValueError: for anything else.
    """
    if rate == "none":
        return None
    found = _RATE.fullmatch(rate)
    if found is None:
        raise ValueError(f"a rate is a number with kbit, mbit or gbit, such as 25mbit, or none; got {rate!r}")
    return float(found[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[found[2]]


def check_machine() -> None:
    """Raise NetworkError where the network cannot be made, before anything is."""
    missing = [f"{name} was not found" for name in ("ip", "tc") if shutil.which(name) is None]
    if os.geteuid() != 0:
        missing.append("this is not root")
    if missing:
        raise NetworkError(f"network namespaces need root and iproute2 (apt install iproute2): {', '.join(missing)}")


class SlowNetwork:
    """`num_nodes` namespaces around a bridge. Use as a context manager; without limit at first.

    Raises:
        NetworkError: if this machine cannot make it.
    """

    def __init__(self, num_nodes: int):
        check_machine()
        remove_leftovers()
        self.num_nodes = num_nodes
        self._name = f"{PREFIX}-{os.getpid()}-{_start_time(os.getpid())}"
        self._bridge = f"{self._name}-bridge"
        self._watchdog = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), self._name], stdin=subprocess.PIPE, start_new_session=True
        )
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> SlowNetwork:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def namespace(self, node: int) -> str:
        return f"{self._name}-node{node}"

    def address(self, node: int) -> str:
        return f"{SUBNET}.{node + 1}"

    def command(self, node: int) -> list[str]:
        """What to put before a command that shall run on a node."""
        return ["ip", "netns", "exec", self.namespace(node)]

    def set_rate(self, rate: str) -> None:
        """Limit every link in both directions to a rate such as `25mbit`, or `none`."""
        bits = bits_per_second(rate)
        for node in range(self.num_nodes):
            for space, device in ((self.namespace(node), INTERFACE), (self._bridge, f"s{node}")):
                if bits is None:
                    subprocess.run(
                        ["tc", "-n", space, "qdisc", "del", "dev", device, "root"], capture_output=True, check=False
                    )
                    continue
                burst = max(MIN_BURST, int(bits / 8 * BURST_MS / 1e3))
                bucket = ["tbf", "rate", f"{bits:.0f}bit", "burst", f"{burst}b", "latency", f"{QUEUE_MS}ms"]
                _run("tc", "-n", space, "qdisc", "replace", "dev", device, "root", *bucket)

    def close(self) -> None:
        """End what runs on the nodes and remove them."""
        assert self._watchdog.stdin is not None
        self._watchdog.stdin.close()
        self._watchdog.wait()

    def _make(self) -> None:
        _run("ip", "netns", "add", self._bridge)
        _run("ip", "-n", self._bridge, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", self._bridge, "link", "set", "br0", "addrgenmode", "none", "up")
        for node in range(self.num_nodes):
            space, port = self.namespace(node), f"s{node}"
            _run("ip", "netns", "add", space)
            _run("ip", "-n", space, "link", "set", "lo", "up")
            pair = ["type", "veth", "peer", "name", port, "netns", self._bridge]
            _run("ip", "link", "add", INTERFACE, "netns", space, *pair)
            _run("ip", "-n", space, "addr", "add", f"{self.address(node)}/24", "dev", INTERFACE)
            _run("ip", "-n", space, "link", "set", INTERFACE, "addrgenmode", "none", "up")
            _run("ip", "-n", self._bridge, "link", "set", port, "master", "br0", "addrgenmode", "none", "up")


def sent_bytes() -> int:
    """Bytes that this process's node has sent to the others since it was made, as its interface counts them."""
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())


def namespaces() -> list[str]:
    """All namespaces of this module's naming."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line and _NAME.fullmatch(line.split()[0])]


def remove_leftovers() -> int:
    """Remove the namespaces of runs that are dead, with what lives in them; returns how many there were."""
    dead = []
    for name in namespaces():
        found = _NAME.fullmatch(name)
        if found and _start_time(int(found[1])) != found[2]:
            dead.append(name)
    _remove(dead)
    return len(dead)


def _remove(names: list[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 3.0
        alive = _processes_in(names)
        for pid in alive:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        while alive and time.monotonic() < deadline:
            time.sleep(0.05)
            alive = _processes_in(names)
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _processes_in(names: list[str]) -> list[int]:
    found: list[int] = []
    for name in names:
        listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
        found += [int(pid) for pid in listed.split()]
    return found


def _start_time(pid: int) -> str | None:
    """Clock ticks after boot at which a process started: with the id it names one process for good."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise NetworkError(f"a slow network cannot be made here: `{' '.join(command)}` said: {said}")


def _watch(name: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()  # returns when the run is gone
    _remove([space for space in namespaces() if space.startswith(f"{name}-")])


if __name__ == "__main__":
    _watch(sys.argv[1])
