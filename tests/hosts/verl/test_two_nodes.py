"""Two Ray nodes, each with an address, a host name, a /tmp and shared memory of its own: a run over both works."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
SCRIPT = str(SCRIPTS / "two_nodes.py")
TINY = (
    "data.train_size=4",
    "data.train_batch_size=4",
    "data.max_response_length=96",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
)
"""An epoch is one step of 4 prompts x 4 samples, so that step 2 drafts from the history of both engines."""
CHECKS = 11
TIMEOUT_S = 500

sys.path.insert(0, str(SCRIPTS))

import ray_nodes  # noqa: E402
import slow_network  # noqa: E402


@pytest.fixture(scope="module")
def two_nodes():
    """Skips where the machine cannot make nodes; a Ray that does not start on them is an error."""
    try:
        ray_nodes.check_machine()
        with slow_network.SlowNetwork(2):
            pass
    except slow_network.NetworkError as error:
        pytest.skip(str(error))


def left_of(pid: int) -> list[str]:
    """Namespaces of a run."""
    return [name for name in slow_network.namespaces() if name.startswith(f"{slow_network.PREFIX}-{pid}-")]


def wait_for(what, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.1)
    return bool(what())


def test_a_run_over_two_nodes(two_nodes, tmp_path):
    """Everything at once: ranks and engines on both nodes, history shared without a folder, 4 bits between nodes whose
    bytes are counted by the interfaces, equal replicas (`check_every=1` stops the run otherwise)."""
    script = subprocess.Popen(
        [sys.executable, SCRIPT, "--arms", "deepspeed_comm", "--steps", "2", "--runs", str(tmp_path / "runs"), *TINY],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = script.communicate(timeout=TIMEOUT_S)
    finally:
        script.terminate()
        script.wait(30)
    assert script.returncode == 0, output[-6000:]
    assert left_of(script.pid) == []
    result = json.loads((tmp_path / "runs/two_nodes.json").read_text())["arms"]["deepspeed_comm"]
    assert len(result["checks"]) == CHECKS and all(result["checks"].values())
    assert result["history_shared"] == 4  # two engines, two epochs
    assert result["accepted_by_history"] > 0
    said = result["steps"][1]["gradient_inter_bytes"] + result["steps"][1]["weight_inter_bytes"]
    for sent in result["steps"][1]["sent_bytes_by_node"]:
        # Ray's own, rollouts and log-probs are the rest; weights and gradients in 16 bits alone are 3.7 times as much.
        assert said < sent < 2.5 * said
    for node in result["cpu_s_by_node"]:
        assert min(node.values()) > 0.1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_after_a_signal(two_nodes, tmp_path, number):
    script = subprocess.Popen(
        [sys.executable, SCRIPT, "--arms", "deepspeed", "--runs", str(tmp_path / "runs"), *TINY],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    living: list[int] = []

    def has_driver() -> bool:
        living[:] = slow_network._processes_in(left_of(script.pid))
        return (tmp_path / "runs/deepspeed.log").exists() and len(living) > 10

    try:
        assert wait_for(has_driver, 120)
        script.send_signal(number)
        script.wait(60)
        assert wait_for(lambda: not left_of(script.pid), 30)
        assert not [pid for pid in living if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
    finally:
        script.kill()
        script.wait()


def test_a_cluster_of_one_node_is_refused_before_anything_starts(two_nodes, tmp_path):
    """The message names what was found; without the check verl says it after minutes, or waits for ever."""
    with ray_nodes.RayNodes(1, hidden=tmp_path, kept=[SCRIPTS.parent, Path(sys.prefix)]) as nodes:
        done = subprocess.run(
            [
                *nodes.command(0),
                *(
                    sys.executable,
                    "-m",
                    "rl_accel.train",
                    "recipe=gsm8k_grpo/cpu_nodes",
                    f"rl_accel.run_dir={tmp_path}/a",
                ),
            ],
            capture_output=True,
            text=True,
            env=nodes.env(),
            cwd=tmp_path,
            timeout=120,
            check=False,
        )
    assert done.returncode == 1
    assert "trainer.nnodes=2: the Ray cluster has room for 1" in done.stderr
    assert "10.77.0.1 with 1 GPU, 16 CPU" in done.stderr
