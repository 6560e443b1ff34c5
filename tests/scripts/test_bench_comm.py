"""The benchmark of communication cleans up after itself whatever way it ends, and measures what it says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
BENCH = str(SCRIPTS / "bench_comm.py")
TINY = ("--width", "64", "--layers", "2", "--backend", "torch", "--skip-tests")

sys.path.insert(0, str(SCRIPTS))

import slow_network  # noqa: E402


@pytest.fixture(scope="module")
def network():
    """Skips where the machine cannot make network namespaces."""
    try:
        with slow_network.SlowNetwork(2) as made:
            yield made
    except slow_network.NetworkError as error:
        pytest.skip(str(error))


def spaces_of(pid: int) -> list[str]:
    return [name for name in slow_network.namespaces() if name.startswith(f"{slow_network.PREFIX}-{pid}-")]


def wait_for(what, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.1)
    return bool(what())


def run_in_child(code: str, **env: str) -> subprocess.CompletedProcess:
    program = f"import os, sys; sys.path.insert(0, {str(SCRIPTS)!r}); import bench_comm; {code}"
    return subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )


def test_without_iproute2_it_says_so_in_one_line():
    done = run_in_child("sys.exit(bench_comm.main([]))", PATH="")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "iproute2" in line and "ip was not found, tc was not found" in line


def test_without_root_it_says_so_in_one_line():
    done = run_in_child("os.geteuid() or os.seteuid(65534); sys.exit(bench_comm.main([]))")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "this is not root" in line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_namespaces_and_ranks_are_gone_after_a_signal(network, number):
    bench = subprocess.Popen(
        [sys.executable, BENCH, *TINY], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    ranks: list[int] = []
    try:

        def has_ranks() -> bool:
            ranks[:] = slow_network._processes_in(spaces_of(bench.pid))
            return len(ranks) == 4

        assert wait_for(has_ranks, 60), "the ranks did not start"
        bench.send_signal(number)
        bench.wait(60)
        assert wait_for(lambda: not spaces_of(bench.pid), 30), "namespaces are left"
        assert wait_for(lambda: not any(psutil.pid_exists(pid) for pid in ranks), 30), "ranks are left"
    finally:
        bench.kill()
        bench.wait()


def test_what_a_dead_run_left_is_removed_and_a_live_run_is_not(network):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = f"{slow_network.PREFIX}-{ended.pid}-1-node0"
    subprocess.run(["ip", "netns", "add", left], check=True)
    sleeper = subprocess.Popen(["ip", "netns", "exec", left, "sleep", "600"])
    try:
        assert wait_for(lambda: slow_network._processes_in([left]), 10)
        assert slow_network.remove_leftovers() == 1
        assert sleeper.wait(10) != 0
        assert left not in slow_network.namespaces()
        assert len(spaces_of(os.getpid())) == 3
    finally:
        sleeper.kill()
        sleeper.wait()
        subprocess.run(["ip", "netns", "del", left], capture_output=True, check=False)


def test_a_rate_holds_both_ways(network):
    """4 MB at 100 Mbit/s take 0.32 s; a burst may save a little, a busy machine may take longer."""
    network.set_rate("100mbit")
    receive = "import socket; s = socket.create_server(('10.77.0.{}', 4711)); print(flush=True); c, _ = s.accept()\n"
    receive += "while c.recv(65536): pass"
    send = "import socket, time; s = socket.create_connection(('10.77.0.{}', 4711)); t = time.time()\n"
    send += "s.sendall(bytes(4_000_000)); s.shutdown(1); s.recv(1); print(time.time() - t)"
    for sender in (0, 1):
        python = [sys.executable, "-c"]
        with subprocess.Popen(
            [*network.command(1 - sender), *python, receive.format(2 - sender)], stdout=subprocess.PIPE
        ) as receiver:
            receiver.stdout.readline()
            out = subprocess.check_output([*network.command(sender), *python, send.format(2 - sender)])
        assert 0.27 < float(out) < 2


def run_tiny(path: Path, *options: str) -> dict[str, dict]:
    short = ("--rate", "100mbit", "--steps", "1", "--repeats", "2", "--json", str(path))
    done = subprocess.run([sys.executable, BENCH, *TINY, *short, *options], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return {row["name"]: row for row in json.loads(path.read_text())}


def test_a_tiny_run_sends_a_sixth_of_the_bytes(network, tmp_path):
    rows = run_tiny(tmp_path / "rows.json", "--arms", "deepspeed,sdp4bit")
    for name in ("comm.wire_bytes", "comm.wire_bytes.2x2.1b.100mbit"):
        assert rows[name]["value"] < rows[name]["incumbent"] / 6
    assert 4 < rows["comm.wire_bits.weights"]["value"] < 5
    assert rows["comm.step_s.2x2.1b.100mbit"]["value"] > 0


def test_a_tiny_run_on_fsdp2_sends_a_sixth_of_the_bytes(network, tmp_path):
    """Against gradients on their way in bfloat16; verl's default is float32."""
    rows = run_tiny(tmp_path / "rows.json", "--fsdp2", "bfloat16", "--arms", "fsdp2,sdp4bit")
    for name in ("comm.wire_bytes", "comm.wire_bytes.2x2.1b.fsdp2.100mbit"):
        assert rows[name]["value"] < rows[name]["incumbent"] / 6
