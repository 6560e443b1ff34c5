"""Real trainings: `python -m rl_accel.train` and plain verl in processes of their own, each arm once per session."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf

STEPS = 4
TIMEOUT_S = 600
TINY = (
    "data.train_size=64",
    "data.val_size=16",
    "data.train_batch_size=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.actor.use_kl_loss=true",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4",
    "data.max_response_length=96",
    f"trainer.total_training_steps={STEPS}",
    f"trainer.test_freq={STEPS}",
    "trainer.val_before_train=false",
    "trainer.save_freq=2",
    "trainer.logger=[file]",
    "rl_accel.sync.readback=every",
)
"""A run of 4 steps with 4 prompts x 4 samples, a checkpoint at step 2 and 4, a validation at the end."""


@dataclass(frozen=True)
class Run:
    """A finished run and what it left behind."""

    path: Path
    output: str
    returncode: int

    def metrics(self) -> dict[int, dict[str, float]]:
        """Step -> metrics."""
        lines = (self.path / "metrics.jsonl").read_text().splitlines()
        return {record["step"]: record["data"] for record in map(json.loads, lines)}


class Trainings:
    """Starts trainings; `run` waits for one, `start` leaves the process to the caller."""

    def __init__(self, root: Path):
        self.root = root
        self._finished: dict[str, Run] = {}
        self._started: list[subprocess.Popen] = []

    def start(
        self, name: str, *overrides: str, env: dict[str, str] | None = None
    ) -> tuple[subprocess.Popen, Path, str]:
        """Start `rl_accel.train` with the tiny settings; returns process, run folder and a mark of its processes."""
        path, mark = self.root / name, uuid.uuid4().hex
        command = [sys.executable, "-m", "rl_accel.train", "recipe=gsm8k_grpo/cpu", *TINY]
        command += [f"rl_accel.run_dir={path}", *overrides]
        log = (self.root / f"{name}.log").open("a")
        env = {**os.environ, "RL_ACCEL_TEST_MARK": mark, "RL_ACCEL_DEVICE": "cpu", **(env or {})}
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=self.root, preexec_fn=_hear_ctrl_c
        )
        self._started.append(process)
        return process, path, mark

    def end_all(self) -> None:
        """End what a failed test left running."""
        for process in self._started:
            if process.poll() is None:
                process.terminate()
                process.wait(60)

    def run(self, name: str, *overrides: str) -> Run:
        """Train to the end; a name is trained once."""
        if name not in self._finished:
            process, path, _ = self.start(name, *overrides)
            returncode = process.wait(TIMEOUT_S)
            output = (self.root / f"{name}.log").read_text()
            assert returncode == 0, output[-6000:]
            self._finished[name] = Run(path, output, returncode)
        return self._finished[name]

    def run_plain_verl(self, name: str, like: Run, *overrides: str) -> Run:
        """Run stock `verl.trainer.main_ppo` with the configuration of another run, less its rl_accel block."""
        path = self.root / name
        path.mkdir()
        config = OmegaConf.load(like.path / "config.yaml")
        del config.rl_accel
        del config.actor_rollout_ref.rollout.custom
        config.trainer.default_local_dir = str(path / "checkpoints")
        OmegaConf.save(config, path / "plain.yaml")
        env = {
            **os.environ,
            "VERL_PLATFORM": "cpu",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VERL_FILE_LOGGER_PATH": str(path / "metrics.jsonl"),
            "OMP_NUM_THREADS": str(os.cpu_count()),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        command = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-path", str(path), "--config-name", "plain"]
        result = subprocess.run(
            [*command, "hydra.run.dir=.", "hydra.output_subdir=null", *overrides],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=env,
            cwd=path,
            check=False,
        )
        assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
        return Run(path, result.stdout + result.stderr, result.returncode)


def _hear_ctrl_c() -> None:
    """A shell starts background jobs with SIGINT ignored, and ignored signals are inherited."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def marked_processes(mark: str) -> list[psutil.Process]:
    """Living processes that were started, directly or not, by the training with this mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RL_ACCEL_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="session")
def trainings(tmp_path_factory) -> Iterator[Trainings]:
    trainings = Trainings(tmp_path_factory.mktemp("trainings"))
    yield trainings
    trainings.end_all()


@pytest.fixture(scope="session")
def plain_run(trainings) -> Run:
    """Exact sampling, no drafts."""
    return trainings.run("none")
