"""Runs in wandb's keeping: its offline `.wandb` files and its server.

The reader of `.wandb` files is here because wandb 0.31 no longer ships one in Python. A run that was killed leaves a
torn tail, which is left out. Costs the file's size in memory.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rl_accel.compare.reading import check_step, numbers, reading
from rl_accel.errors import CompareError

Metrics = dict[str, dict[int, float]]
"""metric -> step -> value"""


def find_wandb_file(path: Path) -> Path:
    """Return the one `.wandb` file of a wandb run folder, or the path itself if it is one."""
    files = [path] if path.is_file() else sorted(path.glob("run-*.wandb"))
    if len(files) != 1 or files[0].suffix != ".wandb":
        raise CompareError(f"{path} is no run: expected metrics.jsonl or one run-*.wandb file in it")
    return files[0]


def read_wandb_file(path: Path) -> tuple[str, Metrics, bool]:
    """Read an offline run.

    Returns:
        Its name, its metrics, and whether it finished: the file ends with the record of an exit with status 0. verl
        closes its run with status 0 also when it fails, if Python still gets to do so.

    Raises:
        CompareError: it is not such a file, or is damaged before its end.
    """
    from wandb.proto import wandb_internal_pb2

    name, metrics, finished = path.parent.resolve().name, Metrics(), False
    with reading(path, "a wandb file"):
        for payload in _payloads(path):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(payload)
            kind = record.WhichOneof("record_type")
            if kind == "run" and record.run.display_name:
                name = record.run.display_name
            elif kind == "history":
                items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                add_step(metrics, check_step(items.get("_step", record.history.step.num)), items)
            elif kind == "exit":
                finished = record.exit.exit_code == 0 and not record.exit.not_complete
    return name, metrics, finished


def read_wandb_server(run_path: str) -> tuple[str, Metrics, bool]:
    """Read `entity/project/run_id`; as `read_wandb_file`.

    Raises:
        CompareError: the server does not answer, or does not give it.
    """
    import wandb

    metrics = Metrics()
    try:
        with reading(run_path, "a wandb run"):
            run = wandb.Api(timeout=20).run(run_path)
            for row in run.scan_history():
                add_step(metrics, check_step(row["_step"]), row)
            return str(run.name or run.id), metrics, run.state == "finished"
    except CompareError as error:
        raise CompareError(
            f"{run_path}: there is no such folder, and as a wandb run it cannot be read: {error.__cause__}. Log in "
            "with `wandb login`, or give the run's local folder"
        ) from error


def add_step(metrics: Metrics, step: int, values: dict[str, Any]) -> None:
    """Add the numbers of one step, without wandb's own, whose names start with an underscore."""
    for name, value in numbers((name, value) for name, value in values.items() if not name.startswith("_")).items():
        metrics.setdefault(name, {})[step] = value


def _payloads(path: Path) -> Iterator[bytes]:
    """The records of a `.wandb` file, LevelDB's log format: 32 KiB blocks of (crc32, length, type, data)."""
    block, head = 32768, struct.Struct("<IHB")
    full, first, last = 1, 2, 4  # and 3, a middle chunk
    data = path.read_bytes()
    if data[:7] != struct.pack("<4sHB", b":W&B", 0xBEE1, 0):
        raise CompareError(f"{path} is not a wandb file of version 0 (wandb 0.31 writes those)")
    at = 7
    parts: list[bytes] = []
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
        if kind in (full, first):
            parts.clear()
        parts.append(chunk)
        if kind in (full, last):
            yield b"".join(parts)
