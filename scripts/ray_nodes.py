"""A Ray cluster of several nodes on one machine, each as separate as a machine of its own, with a slow network between.

A node is a network namespace of `slow_network.py` with a host name, a /etc/hosts, a /tmp and a /dev/shm of its own, so
that sockets, shared memory and files of one node are not there for the others. Of /tmp only the folders in `kept` are
seen, and on nodes other than the first `hidden` is an empty folder. What nodes share is the rest of the disk, where
the interpreter, packages and models are. Processes of all nodes share the cores and the memory.

Linux, root, iproute2 and util-linux. Nothing outlives the run, whatever way it ends: the watchdog of the network ends
all processes in its namespaces, and mounts go with the last of them.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import slow_network
from slow_network import INTERFACE, NetworkError, SlowNetwork, _processes_in

TMP = Path("/tmp")
"""Where Ray, verl and vLLM put their sockets, whatever TMPDIR says."""
SHM = Path("/dev/shm")
PORT = 6379
OBJECT_STORE_BYTES = 300 << 20
START_TIMEOUT_S = 120.0
DROPPED_ENV = ("RAY_ADDRESS", "RL_ACCEL_RUN_ID")


def check_machine() -> None:
    """Raise NetworkError where nodes cannot be made, before anything is."""
    slow_network.check_machine()
    missing = [name for name in ("nsenter", "unshare", "mount") if shutil.which(name) is None]
    if missing:
        raise NetworkError(f"nodes need util-linux (apt install util-linux): {', '.join(missing)} not found")


class RayNodes:
    """`num_nodes` nodes with Ray between them. Use as a context manager; without a limit of the network at first.

    Args:
        num_nodes: the first is Ray's head, and where `run` starts programs.
        hidden: folder that only the first node sees.
        kept: folders below /tmp that all nodes see.
        num_cpus: logical processors of a node.
        num_gpus: logical devices of a node.

    Raises:
        NetworkError: if this machine cannot make it.
    """

    def __init__(self, num_nodes: int, hidden: Path, kept: list[Path], num_cpus: int = 16, num_gpus: int = 1):
        check_machine()
        self.num_nodes = num_nodes
        self._hidden = hidden.resolve()
        self._kept = [path.resolve() for path in kept]
        self._resources = ["--num-cpus", str(num_cpus), "--num-gpus", str(num_gpus)]
        self._holders: list[subprocess.Popen] = []
        self.network = SlowNetwork(num_nodes)
        try:
            for node in range(num_nodes):
                self._make(node)
            for node in range(num_nodes):
                self._start_ray(node)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RayNodes:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def address(self) -> str:
        """Of Ray's head."""
        return f"{self.network.address(0)}:{PORT}"

    def command(self, node: int) -> list[str]:
        """What to put before a command that shall run on a node."""
        return ["nsenter", "--target", str(self._holders[node].pid), "--net", "--mount", "--uts", "--"]

    def env(self) -> dict[str, str]:
        """Variables of processes on the nodes."""
        found = {name: value for name, value in os.environ.items() if name not in DROPPED_ENV}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        own = {"PATH": path, "RL_ACCEL_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        # A head asks for tokens where an earlier run has left one in the home folder; nodes that join then bring none.
        return {**found, **own, "RAY_AUTH_MODE": "disabled"}

    def root(self, node: int) -> Path:
        """The files of a node as this process sees them."""
        return Path(f"/proc/{self._holders[node].pid}/root")

    def sent_bytes(self, node: int) -> int:
        """Bytes that a node has sent to the others since it was made, as its interface counts them."""
        for line in Path(f"/proc/{self._holders[node].pid}/net/dev").read_text().splitlines():
            name, _, counters = line.partition(":")
            if name.strip() == INTERFACE:
                return int(counters.split()[8])
        raise NetworkError(f"node {node} has no interface {INTERFACE}")

    def processes(self, node: int) -> dict[int, tuple[str, float]]:
        """Ray's workers on a node: process id -> title, seconds of CPU time with that of the processes they started."""
        found = {}
        for pid in _processes_in([self.network.namespace(node)]):
            try:
                process = psutil.Process(pid)
                title = " ".join(process.cmdline()).strip()
                if title.startswith("ray::"):
                    family = [process, *process.children(recursive=True)]
                    found[pid] = title, sum(sum(member.cpu_times()[:2]) for member in family)
            except psutil.Error:
                continue
        return found

    def keep_logs(self, folder: Path) -> None:
        """Copy Ray's logs of all nodes to `folder`."""
        for node in range(len(self._holders)):
            for logs in (self.root(node) / "tmp/ray").glob("session_2*/logs"):
                shutil.copytree(logs, folder / f"node{node}", dirs_exist_ok=True, symlinks=True)

    def close(self) -> None:
        """End what runs on the nodes and remove them."""
        self.network.close()
        for holder in self._holders:
            holder.wait()

    def _make(self, node: int) -> None:
        """Start the process that holds a node's namespaces open; it ends with this one."""
        names = [f"{self.network.address(other)} node{other}" for other in range(self.num_nodes)]
        hosts = shlex.quote("\n".join(["127.0.0.1 localhost", *names]))
        kept = [*self._kept, self._hidden] if node == 0 else self._kept
        lines = [
            "set -e",
            f"hostname node{node}",
            f"ip route add default dev {INTERFACE}",  # as a node has one: Ray and vLLM ask for its own address by it
            f"mount -t tmpfs tmpfs {SHM}",  # what becomes /tmp
            f"echo {hosts} > {SHM}/hosts",
            f"mount --bind {SHM}/hosts /etc/hosts",
        ]
        for path in (path for path in kept if path.is_relative_to(TMP)):
            inside = shlex.quote(f"{SHM}/{path.relative_to(TMP)}")
            lines += [f"mkdir -p {inside}", f"mount --rbind {shlex.quote(str(path))} {inside}"]
        lines += [f"mount --rbind {SHM} {TMP}", f"mount -t tmpfs tmpfs {SHM}"]
        if node > 0:
            hidden = shlex.quote(str(self._hidden))
            lines += [f"mkdir -p {hidden}", f"mount -t tmpfs tmpfs {hidden}"]
        lines += ["echo ready", "exec cat"]
        command = ["unshare", "--mount", "--uts", "--propagation", "private", "sh", "-c", "\n".join(lines)]
        holder = subprocess.Popen(
            [*self.network.command(node), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._holders.append(holder)
        assert holder.stdout is not None and holder.stderr is not None
        if holder.stdout.readline().strip() != "ready":
            raise NetworkError(f"node {node} cannot be made here: {' '.join(holder.stderr.read().split())}")

    def _start_ray(self, node: int) -> None:
        place = ["--head", "--port", str(PORT)] if node == 0 else ["--address", self.address]
        options = [*place, "--node-ip-address", self.network.address(node), *self._resources]
        options += ["--object-store-memory", str(OBJECT_STORE_BYTES), "--disable-usage-stats"]
        options += ["--include-dashboard=false"] if node == 0 else []
        done = subprocess.run(
            [*self.command(node), sys.executable, "-m", "ray.scripts.scripts", "start", *options],
            capture_output=True,
            text=True,
            env=self.env(),
            timeout=START_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            raise NetworkError(f"Ray does not start on node {node}: {(done.stdout + done.stderr)[-2000:]}")
