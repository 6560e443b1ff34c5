"""Train the arms of a comparison, interleaved over seeds so that a slow phase of the machine meets every arm.

Seed 0 runs the arms in the order given, seed 1 in reverse, and so on, one at a time. Leaves out running in
parallel: arms that share a machine would time each other. A run that finished, or was interrupted, is kept and gone on
with if it was made with the same settings (`reuse`), so that an interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rl_accel.compare.reuse import check_same_settings, holds_run, is_finished
from rl_accel.errors import CompareError

GRACE_S = 20.0
"""Seconds between asking a run to end and killing it; Ray needs some to shut down."""
LOG_LINES_SHOWN = 25
_SET_BY_COMPARE = ("rl_accel.seed", "rl_accel.run_dir")


@dataclass(frozen=True)
class Arm:
    """One way of training."""

    name: str
    overrides: tuple[str, ...]
    """Hydra overrides that make the arm."""


def parse_arms(text: str) -> list[Arm]:
    """Read `none,ngram` (draft methods) or `name:key=value+key2=value2` (any overrides), separated by commas.

    Raises:
        CompareError: fewer than two arms, a name twice, or a name that cannot be a folder's.
    """
    arms = []
    for item in re.split(r",(?![^\[({]*[\])}])", text):
        name, colon, overrides = item.strip().partition(":")
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or (colon and not overrides):
            raise CompareError(f"--arms: {item!r} is neither a draft method nor name:key=value+key2=value2")
        # A plus between overrides stands before `key=`; others belong to a value (1e+5) or to Hydra (+key=).
        parts = re.split(r"(?<=[^+])\+(?=[+~]*[A-Za-z_][\w.@/]*=)", overrides)
        arms.append(Arm(name, tuple(parts) if colon else (f"rl_accel.draft.method={name}",)))
    names = [arm.name for arm in arms]
    if len(arms) < 2 or len(set(names)) < len(names):
        raise CompareError(f"--arms needs two or more different names; got {text!r}")
    return arms


def run_arms(
    arms: Sequence[Arm], seeds: int, overrides: Sequence[str], out: Path, launcher: Sequence[str]
) -> tuple[list[Path], list[str]]:
    """Train every arm with every seed that has not finished yet.

    Args:
        arms: at least two
        seeds: seeds 0 to seeds - 1
        overrides: for all runs, `recipe=...` among them
        out: folder of the run folders `<arm>-seed<k>` and their logs
        launcher: command that takes the overrides

    Returns:
        The run folders and the arm of each, arms in the order given.

    Raises:
        CompareError: a run failed; the text ends with its last output.
    """
    for text in [*overrides, *(text for arm in arms for text in arm.overrides)]:
        if text.lstrip("+~").partition("=")[0] in _SET_BY_COMPARE:
            raise CompareError(f"{text}: seeds and run folders of the arms are set by --seeds and --out")
    order = [(arm, seed) for seed in range(seeds) for arm in (arms if seed % 2 == 0 else arms[::-1])]
    with _alone(out):
        runs = {
            (arm, seed): (out / f"{arm.name}-seed{seed}", [*overrides, *arm.overrides, f"rl_accel.seed={seed}"])
            for arm, seed in order
        }
        for run_dir, settings in runs.values():
            check_same_settings(run_dir, settings)
        for i, ((arm, seed), (run_dir, settings)) in enumerate(runs.items(), start=1):
            _train(run_dir, settings, launcher, f"[{i}/{len(order)}] {arm.name}, seed {seed}")
    by_arm = [(arm, seed) for arm in arms for seed in range(seeds)]
    return [runs[key][0] for key in by_arm], [arm.name for arm, _ in by_arm]


def _train(run_dir: Path, settings: Sequence[str], launcher: Sequence[str], label: str) -> None:
    """Train one run, or go on with it, unless it finished earlier."""
    log = run_dir.with_name(f"{run_dir.name}.log")
    if is_finished(run_dir):
        _say(f"{label}: finished earlier")
        return
    _say(f"{label}: {'going on with the run in its folder' if holds_run(run_dir) else 'running'}, log in {log}")
    started = time.monotonic()
    code = _run([*launcher, *settings, f"rl_accel.run_dir={run_dir.resolve()}"], log)
    if code != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:])
        raise CompareError(f"{label} failed with exit code {code}. The end of {log}:\n{tail}")
    _say(f"{label}: {time.monotonic() - started:.1f} s")


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Make the folder and keep other comparisons out of it: two would train into one run folder.

    Raises:
        CompareError: it cannot be written, or another comparison is at work in it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("w")
    except OSError as error:
        raise CompareError(f"--out {out} cannot be written: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CompareError(f"another comparison trains in {out}: wait for it, or give another --out") from error
        except OSError as error:  # a file system without locks
            _say(f"{out} cannot be locked ({error}): start no second comparison in it")
        yield


def _run(command: Sequence[str], log: Path) -> int:
    """Run a command in a process group of its own, and leave nothing of that group behind.

    A leftover worker would slow the next arm down. SIGTERM to this process counts as Ctrl-C.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        with log.open("ab") as file:
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
                )
            except OSError as error:
                raise CompareError(f"cannot start {command[0]}: {error}") from error
        try:
            return process.wait()
        except KeyboardInterrupt:
            _signal_group(process.pid, signal.SIGTERM)
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                _say(f"the run did not end within {GRACE_S:.0f} s: killing it")
            raise
        finally:
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()
    finally:
        signal.signal(signal.SIGTERM, previous)


def _signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
