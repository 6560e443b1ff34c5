"""What a training run recorded: from its folder, from a wandb offline file, or from wandb's server.

Leaves out system metrics, media and nested values: a metric is a number per step. A run is held in memory
whole (about 100 bytes per metric and step). The reader of `.wandb` files is here because wandb 0.31 no
longer ships one in Python.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

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

    def keys(self, quantity: str) -> tuple[str, ...]:
        """The metrics that carry a quantity; several where validation has several data sets."""
        for pattern in QUANTITIES[quantity]:
            matching = sorted(name for name in self.metrics if fnmatchcase(name, pattern))
            if matching:
                return tuple(matching)
        return ()

    def series(self, quantity: str) -> dict[int, float]:
        """Finite values by step, in order; the mean over `keys(quantity)` at steps that have all of them."""
        columns = [self.metrics[key] for key in self.keys(quantity)]
        if not columns:
            return {}
        steps = sorted(set(columns[0]).intersection(*columns[1:]))
        means = {step: sum(column[step] for column in columns) / len(columns) for step in steps}
        return {step: value for step, value in means.items() if math.isfinite(value)}


def load_run(source: str | Path, arm: str | None = None) -> Run:
    """Read one run.

    Args:
        source: a run folder (`metrics.jsonl`), a wandb run folder or `.wandb` file, or
        `entity/project/run_id`. arm: name of its arm; None takes run.json's, else the folder's name without
        `-seedK`.

    Raises:
        CompareError: there is no such run, it has no metrics, or its files are damaged.
    """
    path = Path(source)
    info: dict[str, Any] = {}
    if (path / "metrics.jsonl").is_file():
        name, metrics = path.resolve().name, _read_metrics(path / "metrics.jsonl")
        info = _read_info(path / "run.json")
    elif path.exists():
        name, metrics = _read_wandb_file(_wandb_file(path))
    elif re.fullmatch(r"[^/\s]+/[^/\s]+/[^/\s]+", str(source)):
        name, metrics = _read_wandb_server(str(source))
    else:
        raise CompareError(f"{source}: no such run folder (and not a wandb run, which is entity/project/run_id)")
    if not metrics:
        raise CompareError(f"{source} has no metrics yet: the run logged no step")
    label, seed = _split_seed(name)
    if isinstance(info.get("seed"), int):
        seed = info["seed"]
    tokens = path / "tokens"
    arm = arm or info.get("arm") or label
    return Run(str(source), name, str(arm), seed, metrics, tokens if tokens.is_dir() else None, info)


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


def _read_info(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        info = json.loads(path.read_text())
    except ValueError as error:
        raise CompareError(f"{path} is not JSON: {error}") from error
    if not isinstance(info, dict):
        raise CompareError(f"{path} must hold a mapping; got {type(info).__name__}")
    return info


def _read_metrics(path: Path) -> dict[str, dict[int, float]]:
    """Read verl's FileLogger file: the last value of a repeated step wins, a torn last line is none."""
    metrics: dict[str, dict[int, float]] = {}
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        # A resumed run writes behind the torn line of the one that was killed.
        start = max(line.rfind(b'{"step"'), 0)
        try:
            record = json.loads(line[start:])
            step, data = int(record["step"]), record["data"].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines):
                break
            raise CompareError(f"{path}, line {number} is not a metrics record: {error}") from error
        _add(metrics, step, data)
    return metrics


def _add(metrics: dict[str, dict[int, float]], step: int, data: Any) -> None:
    for key, value in data:
        if value is None or value == "NaN":  # orjson writes NaN as null, wandb's server as "NaN"
            value = math.nan
        if isinstance(value, int | float):
            metrics.setdefault(key, {})[step] = float(value)


def _wandb_file(path: Path) -> Path:
    files = [path] if path.is_file() else sorted(path.glob("run-*.wandb"))
    if len(files) != 1 or files[0].suffix != ".wandb":
        raise CompareError(f"{path} is no run: expected metrics.jsonl or one run-*.wandb file in it")
    return files[0]


def _read_wandb_file(path: Path) -> tuple[str, dict[str, dict[int, float]]]:
    from wandb.proto import wandb_internal_pb2

    name = path.parent.resolve().name
    metrics: dict[str, dict[int, float]] = {}
    for payload in _wandb_payloads(path):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(payload)
        kind = record.WhichOneof("record_type")
        if kind == "run" and record.run.display_name:
            name = record.run.display_name
        elif kind == "history":
            items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            step = int(items.get("_step", record.history.step.num))
            _add(metrics, step, ((key, value) for key, value in items.items() if not key.startswith("_")))
    return name, metrics


def _wandb_payloads(path: Path) -> Iterator[bytes]:
    """The records of a `.wandb` file, LevelDB's log format: 32 KiB blocks of (crc32, length, type, data).

    A run that was killed leaves a torn tail, which is left out.
    """
    block, head = 32768, struct.Struct("<IHB")
    full, first, last = 1, 2, 4  # and 3, a middle chunk
    data = path.read_bytes()
    if data[:7] != struct.pack("<4sHB", b":W&B", 0xBEE1, 0):
        raise CompareError(f"{path} is not a wandb file of version 0 (wandb 0.31 writes those)")
    at, parts = 7, b""
    while at + head.size <= len(data):
        if block - at % block < head.size:
            at += block - at % block
            continue
        crc, length, kind = head.unpack_from(data, at)
        chunk = data[at + head.size : at + head.size + length]
        fits = length <= block - at % block - head.size
        if fits and len(chunk) < length:
            return
        if not fits or zlib.crc32(chunk, zlib.crc32(bytes([kind]))) != crc:
            raise CompareError(f"{path} is damaged at byte {at}: checksum mismatch")
        at += head.size + length
        parts = chunk if kind in (full, first) else parts + chunk
        if kind in (full, last):
            yield parts


def _read_wandb_server(run_path: str) -> tuple[str, dict[str, dict[int, float]]]:
    import wandb

    metrics: dict[str, dict[int, float]] = {}
    try:
        run = wandb.Api(timeout=20).run(run_path)
        for row in run.scan_history():
            _add(metrics, int(row["_step"]), ((k, v) for k, v in row.items() if not k.startswith("_")))
    except (wandb.errors.Error, OSError, ValueError) as error:
        raise CompareError(
            f"{run_path}: there is no such folder, and as a wandb run it cannot be read: {error}. Log in "
            "with `wandb login`, or give the run's local folder"
        ) from error
    return run.name or run.id, metrics
