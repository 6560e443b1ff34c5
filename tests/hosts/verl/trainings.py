"""Real trainings: `python -m rl_accel.train` and plain verl in processes of their own, and what two of them share."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from omegaconf import OmegaConf

from rl_accel.compare.tokens import load_tokens

STEPS = 4
TIMEOUT_S = 600
TINY = (
    "data.train_size=8",
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
"""Two epochs of two steps with 4 prompts x 4 samples, a checkpoint at step 2 and 4, a validation at the end."""

THREADS = {"OMP_NUM_THREADS": "1"}
"""Of a process: two trainings run side by side, and OpenMP threads that wait for each other would take both cores."""


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
        recipe = [] if any(text.startswith("recipe=") for text in overrides) else ["recipe=gsm8k_grpo/cpu"]
        command = [sys.executable, "-m", "rl_accel.train", *recipe, *TINY]
        command += [f"rl_accel.run_dir={path}", *overrides]
        log = (self.root / f"{name}.log").open("a")
        env = {**os.environ, **THREADS, "RL_ACCEL_TEST_MARK": mark, "RL_ACCEL_DEVICE": "cpu", **(env or {})}
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=self.root, preexec_fn=_hear_ctrl_c
        )
        self._started.append(process)
        return process, path, mark

    def output(self, name: str) -> str:
        """What the run, started perhaps more than once, has printed."""
        return (self.root / f"{name}.log").read_text()

    def end_all(self) -> None:
        """End what a failed test left running."""
        for process in self._started:
            if process.poll() is None:
                process.terminate()
                process.wait(60)

    def run(self, name: str, *overrides: str, env: dict[str, str] | None = None) -> Run:
        """Train to the end; a name is trained once."""
        if name not in self._finished:
            process, path, _ = self.start(name, *overrides, env=env)
            returncode = process.wait(TIMEOUT_S)
            output = self.output(name)
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
            **THREADS,
            "VERL_PLATFORM": "cpu",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VERL_FILE_LOGGER_PATH": str(path / "metrics.jsonl"),
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


def wait_for_end_of(mark: str, seconds: float) -> list[psutil.Process]:
    """Wait until no process of a training lives; returns those that still do."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and marked_processes(mark):
        time.sleep(0.5)
    return marked_processes(mark)


def wait_for_text(path: Path, text: str, process: subprocess.Popen) -> None:
    """Wait until a file that a running training writes contains a text."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(FileNotFoundError):  # it may be renamed at any moment
            if text in path.read_text():
                return
        time.sleep(0.01)
    raise AssertionError(f"{text!r} is not in {path}; exit status {process.poll()}")


def latest_checkpoint(path: Path) -> int:
    """Step of the checkpoint that a run would go on from; 0 if it has none."""
    tracker = path / "checkpoints" / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else 0


def tokens_of(run: Run, step: int) -> dict[tuple[str, int], list[int]]:
    """(problem, sample) -> token ids."""
    return {key: row.token_ids.tolist() for key, row in load_tokens(run.path / "tokens" / f"{step}.npz").items()}


def tokens(run: Run) -> dict[tuple[int, str, int], list[int]]:
    """(step, problem, sample) -> token ids."""
    rows = {(step, *key): row for step in range(1, STEPS + 1) for key, row in tokens_of(run, step).items()}
    assert len(rows) == STEPS * 16
    return rows


def trained(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics that follow from tokens and weights: not times, not throughput, not speculation, and not the engine's
    log-probs, whose last bits depend on what was in a batch together."""
    kept = ("actor/", "critic/", "response_length/", "val-core/")
    skipped = ("actor/perf", "actor/mfu")
    found = {key: value for key, value in metrics.items() if key.startswith(kept) and not key.startswith(skipped)}
    return {key: value for key, value in found.items() if not key.endswith("_s")}


def probs_diff(metrics: dict[str, float]) -> dict[str, float]:
    """How far engine and trainer are apart in a step; about 1e-6, of which the last bits depend on the batch."""
    found = {key: value for key, value in metrics.items() if key.startswith("training/rollout_probs_diff")}
    assert found
    return found


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Weights in the last checkpoint of a run of one rank."""
    state = torch.load(path / f"checkpoints/global_step_{STEPS}/actor/model_world_size_1_rank_0.pt", weights_only=False)
    return {name: getattr(tensor, "_local_tensor", tensor) for name, tensor in state.items()}


def assert_same_policy(metrics: dict[str, float]) -> None:
    """Engine and trainer hold the same weights in a step, which were read back, and give the same log-probs."""
    assert 0 <= metrics["training/rollout_probs_diff_max"] < 1e-4
    assert metrics["training/rollout_actor_probs_pearson_corr"] > 0.9999
    assert metrics["rl_accel/rollout/logprob_abs_diff_mean"] < 1e-4
    assert metrics["rl_accel/sync/readback_max_abs_err"] < 1e-6
    assert metrics["rl_accel/sync/bytes"] > 1e6


def assert_same_run(run: Run, expected: Run, exact: bool = True) -> None:
    """Every step is there once, with the same tokens, updates and validation, and the same log-probs to rounding.

    Args:
        exact: updates and final weights are equal to the last bit; else updates to rounding, for runs that saved none.
    """
    assert sorted(run.metrics()) == sorted(expected.metrics()) == list(range(1, STEPS + 1))
    assert tokens(run) == tokens(expected)
    for step, metrics in expected.metrics().items():
        ours, theirs = run.metrics()[step], metrics
        if exact:
            shared = trained(theirs).keys()
            assert {name: ours[name] for name in shared} == trained(theirs), step
        else:
            assert trained(ours) == pytest.approx(trained(theirs), rel=1e-5, abs=1e-7), step
        assert probs_diff(ours) == pytest.approx(probs_diff(theirs), abs=1e-5), step
    if exact:
        found, wanted = weights(run.path), weights(expected.path)
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[name], found[name]) for name in wanted)
