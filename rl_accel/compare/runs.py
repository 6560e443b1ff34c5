"""What a training run recorded: from its folder, from a wandb offline file, or from wandb's server.

Leaves out system metrics, media and nested values: a metric is a number per step. A run is held in memory
whole (about 100 bytes per metric and step).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rl_accel.compare.reading import parse_metrics_line, read_json_object, reading
from rl_accel.compare.wandb_file import Metrics, find_wandb_file, read_wandb_file, read_wandb_server
from rl_accel.errors import CompareError

QUANTITIES: dict[str, tuple[str, ...]] = {
    "reward": ("critic/score/mean",),
    "accuracy": ("val-core/*/acc/mean@*", "val-core/*/reward/mean@*"),
    "response_length": ("response_length/mean",),
    "response_length_p50": ("response_length/p50",),
    "response_length_p95": ("response_length/p95",),
    "response_length_max": ("response_length/max",),
    "rollout_s": ("timing_s/gen",),
    "step_s": ("timing_s/step",),
    "accept_length": ("rollout/spec_accept_length",),
    "accept_rate": ("rollout/spec_accept_rate",),
    "slowest_request_s": ("rollout/slowest_request_s",),
    "pg_loss": ("actor/pg_loss",),
    "grad_norm": ("actor/grad_norm",),
    "probs_diff_max": ("training/rollout_probs_diff_max",),
}
"""What is compared, and the metric names that carry it (patterns, the first that matches anything counts)."""

LARGEST = 1e100
"""Beyond it nothing is a measurement: such a value counts as infinite, so that no square or sum overflows."""


@dataclass(frozen=True)
class Run:
    """One training run."""

    source: str
    """The argument it was read from."""
    name: str
    arm: str
    seed: int | None
    metrics: Mapping[str, Mapping[int, float]]
    """metric -> step -> value; NaN where the trainer logged NaN"""
    tokens_dir: Path | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    """run.json, or empty"""
    finished: bool | None = None
    """Whether it ran to its end; None: its files do not say."""

    def steps(self) -> set[int]:
        """The steps with any metric."""
        return set().union(*self.metrics.values())

    def keys(self, quantity: str) -> tuple[str, ...]:
        """The metrics that carry a quantity; several where validation has several data sets."""
        for pattern in QUANTITIES[quantity]:
            matching = sorted(name for name in self.metrics if fnmatchcase(name, pattern))
            if matching:
                return tuple(matching)
        return ()

    def logged(self, quantity: str) -> dict[int, float]:
        """The mean over `keys(quantity)` by step, in order; NaN where one of them is absent or not finite."""
        columns = [self.metrics[key] for key in self.keys(quantity)]
        values = {}
        for step in sorted(set().union(*columns)):
            parts = [column.get(step, math.nan) for column in columns]
            finite = all(abs(part) < LARGEST for part in parts)
            values[step] = sum(parts) / len(parts) if finite else math.nan
        return values

    def series(self, quantity: str) -> dict[int, float]:
        """The finite values of `logged`."""
        return {step: value for step, value in self.logged(quantity).items() if math.isfinite(value)}


def load_run(source: str | Path, arm: str | None = None) -> Run:
    """Read one run.

    Args:
        source: a run folder (`metrics.jsonl`), a wandb run folder or `.wandb` file, or
        `entity/project/run_id`. arm: name of its arm; None takes run.json's, else the folder's name without
        `-seedK`.

    Raises:
        CompareError: there is no such run, it has no metrics, or its files are damaged.
    """
    with reading(source, "a run"):
        return _load_run(Path(source), str(source), arm)


def _load_run(path: Path, source: str, arm: str | None) -> Run:
    info: dict[str, Any] = {}
    finished: bool | None
    if (path / "metrics.jsonl").is_file():
        name, metrics = path.resolve().name, read_metrics(path / "metrics.jsonl")
        info = read_json_object(path / "run.json") if (path / "run.json").exists() else {}
        finished = info["finished"] is True if "finished" in info else None
    elif path.exists():
        name, metrics, finished = read_wandb_file(find_wandb_file(path))
    elif re.fullmatch(r"[^/\s]+/[^/\s]+/[^/\s]+", source):
        name, metrics, finished = read_wandb_server(source)
    else:
        raise CompareError(f"{source}: no such run folder (and not a wandb run, which is entity/project/run_id)")
    if not metrics:
        raise CompareError(f"{source} has no metrics yet: the run logged no step")
    label, seed = _split_seed(name)
    if isinstance(info.get("seed"), int):
        seed = int(info["seed"])
    tokens = path / "tokens"
    arm = arm or info.get("arm") or label
    return Run(source, name, str(arm), seed, metrics, tokens if tokens.is_dir() else None, info, finished)


def load_runs(sources: Sequence[str | Path], arms: Sequence[str] | None = None) -> list[Run]:
    """Read runs and give each an arm; runs that all claim one arm become an arm each, by name."""
    runs = [load_run(source, arms[i] if arms else None) for i, source in enumerate(sources)]
    if len(runs) > 1 and len({run.arm for run in runs}) == 1:
        names = [run.name for run in runs]
        if len(set(names)) < len(names):
            names = [run.source for run in runs]
        runs = [replace(run, arm=name) for run, name in zip(runs, names, strict=True)]
    return runs


def group_arms(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by arm, arms in order of first appearance."""
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    return arms


def _split_seed(name: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(.+?)[-_]seed[-_]?(\d+)", name)
    return (match[1], int(match[2])) if match else (name, None)


def read_metrics(path: Path) -> Metrics:
    """Read verl's FileLogger file: the last value of a repeated step wins, a torn last line is none.

    Raises:
        CompareError: a line before the last is damaged.
    """
    metrics = Metrics()
    with reading(path, "a metrics file"):
        lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            step, values = parse_metrics_line(line, f"{path}, line {number}")
        except CompareError:
            if number == len(lines):
                break
            raise
        for name, value in values.items():
            metrics.setdefault(name, {})[step] = value
    return metrics
