"""The trainings that tests share: each is run once a session and serves as many assertions as it can.

| fixture | training | compared with |
|---|---|---|
| `plain_run` | exact sampling, no drafts, FSDP2 | |
| `das_run` | DAS, a speculator and a feature of another package; the disk fills up, a kill, its end | `plain_run` |
| `ngram_run` | plain verl command with flags, ngram drafts | `plain_run` |
| `lookahead_run` | a draft server, steps written ahead with hints in the policy's engine | `plain_run` |
| `best_of_run` | DeepSpeed on two ranks, an agent loop of several outputs, ended by Ctrl-C | step 1 of `plain_run` |
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from .trainings import Run, Trainings, latest_checkpoint, wait_for_end_of, wait_for_text

HERE = Path(__file__).parent
TOY = HERE.parents[1] / "feature" / "toy"
BLOCK = "+actor_rollout_ref.rollout.custom.rl_accel"


@dataclass(frozen=True)
class Session:
    """One start of a run that did not reach its end."""

    returncode: int | None
    output: str
    checkpoint: int
    left: list
    """Processes that outlived it."""


@dataclass(frozen=True)
class DisturbedRun:
    """A run that reached its end in several sessions."""

    run: Run
    disk_full: Session | None
    """None where this machine does not let us mount a file system."""
    killed: Session


@pytest.fixture(scope="session")
def in_fresh_process(run_ranks):
    """Run code in processes that import verl as the Ray processes of a run do; returns the last line printed."""

    def run(code: str, world_size: int = 1, **env: str):
        env = {"VERL_PLATFORM": "cpu", "RL_ACCEL_ACTIVE": "sync,fast_path", **env}
        lines = run_ranks(HERE / "fresh_process.py", world_size, code, timeout=120, **env)
        return [line for line, *_ in lines] if world_size > 1 else (lines[0] or [""])[0]

    return run


@pytest.fixture(scope="session")
def trainings(tmp_path_factory) -> Iterator[Trainings]:
    trainings = Trainings(tmp_path_factory.mktemp("trainings"))
    yield trainings
    trainings.end_all()


@pytest.fixture(scope="session")
def plain_run(trainings) -> Run:
    """Exact sampling, no drafts."""
    return trainings.run("none")


@pytest.fixture(scope="session")
def ngram_run(trainings, plain_run) -> Run:
    """The drop-in form: verl's own command with flags."""
    return trainings.run_plain_verl(
        "drop_in",
        plain_run,
        f"{BLOCK}.sampling.exact=true",
        f"{BLOCK}.run_dir={trainings.root / 'drop_in'}",
        f"{BLOCK}.trace.tokens=true",
        f"{BLOCK}.draft.method=ngram",
    )


@pytest.fixture(scope="session")
def lookahead_run(trainings) -> Run:
    """The shipped policy is the draft: what is trained moves away from it."""
    return trainings.run(
        "lookahead",
        "rl_accel.lookahead.draft=quickstart",
        "rl_accel.lookahead.phases=all",
        "rl_accel.lookahead.adaptive=false",
        "rl_accel.lookahead.hint=true",
        "rl_accel.draft.method=das",
    )


@pytest.fixture(scope="session")
def das_run(trainings) -> Iterator[DisturbedRun]:
    """DAS drafts beside a small head, and the toy feature of `tests/feature`. The disk fills up in the checkpoint of
    step 4 (it holds one of 12 MB, not two); on a larger disk the run is killed after that checkpoint and before the log
    line of its step."""
    name, path = "das", trainings.root / "das"
    settings = ("rl_accel.draft.method=auto", "rl_accel.speculator.width=32", "rl_accel.speculator.publish_s=0.5")
    settings += ("rl_accel.draft.record=true", "rl_accel.toy.enable=true", "rl_accel.toy.size=7")
    settings += ("rl_accel.speculator.trainer_tap=true", "rl_accel.speculator.max_trace_share=0.5")
    settings += ("rl_accel.speculator.advance_s=600",)
    env = {"PYTHONPATH": str(TOY)}
    jumping = {"PYTHONPATH": os.pathsep.join([str(TOY), str(HERE / "jumping_clock")]), "JUMP_SEED": "1"}
    path.mkdir()
    disk_full = None
    with small_disk(path) as resize:
        if resize is not None:
            process, _, mark = trainings.start(name, *settings, env=env)
            returncode = process.wait(600)
            left = wait_for_end_of(mark, 60)
            disk_full = Session(returncode, trainings.output(name), latest_checkpoint(path), left)
            resize(200)
        process, _, mark = trainings.start(name, *settings, env=jumping)
        tracker = path / "checkpoints" / "latest_checkpointed_iteration.txt.pending"
        wait_for_text(tracker, "4", process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        left = wait_for_end_of(mark, 60)
        killed = Session(None, trainings.output(name), latest_checkpoint(path), left)
        yield DisturbedRun(trainings.run(name, *settings, env=env), disk_full, killed)


@contextlib.contextmanager
def small_disk(path: Path):
    """A file system of 16 MiB at `path`; yields a function that gives it another size in MiB, or None."""

    def mount(*options):
        return subprocess.run(["mount", *options, str(path)], capture_output=True, text=True, check=False).returncode

    if shutil.which("mount") is None or os.geteuid() != 0 or mount("-t", "tmpfs", "-o", "size=16m", "tmpfs"):
        yield None
        return
    try:
        yield lambda mebibytes: mount("-o", f"remount,size={mebibytes}m")
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@dataclass(frozen=True)
class InterruptedRun:
    """A run of several steps that Ctrl-C ended."""

    run: Run
    left: list


@pytest.fixture(scope="session")
def best_of_run(trainings) -> InterruptedRun:
    """The shipped recipe with trainer=deepspeed and a loop that asks three times for one prompt; Ctrl-C in step 3."""
    loops = trainings.root / "loops.yaml"
    loops.write_text("- name: best_of\n  _target_: best_of_loop.BestOfLoop\n")
    process, path, mark = trainings.start(
        "best_of",
        "trainer=deepspeed",
        f"actor_rollout_ref.rollout.agent.agent_loop_config_path={loops}",
        "actor_rollout_ref.rollout.agent.default_agent_loop=best_of",
        "trainer.total_training_steps=500",
        "trainer.save_freq=-1",
        "trainer.test_freq=-1",
        env={"PYTHONPATH": str(HERE)},
    )
    try:
        wait_for_text(path / "metrics.jsonl", '"step":2,', process)
        process.send_signal(signal.SIGINT)
        returncode = process.wait(120)
    finally:
        process.kill()
    return InterruptedRun(Run(path, trainings.output("best_of"), returncode), wait_for_end_of(mark, 30))
