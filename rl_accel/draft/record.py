"""Recorded rollouts: one JSON object a line, for replay without a model.

    {"epoch": int, "step": int, "problem": str, "sample": int, "prompt_token_ids": [int], "token_ids": [int]}

Lines are in the order in which steps ran. A reader takes files of others, too: `epoch`, `problem` and `token_ids` are
needed, the rest has defaults.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rl_accel.errors import DraftError


@dataclass(frozen=True)
class Rollout:
    """One response to one problem."""

    epoch: int
    step: int
    problem: str
    sample: int
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]


def append_rollouts(path: str | os.PathLike, rollouts: Iterable[Rollout]) -> None:
    """Append rollouts to a file."""
    with Path(path).open("a") as file:
        for rollout in rollouts:
            file.write(json.dumps(asdict(rollout)) + "\n")


def read_rollouts(path: str | os.PathLike) -> Iterator[Rollout]:
    """Yield the rollouts of a recorded file in its order.

    Raises:
        DraftError: if a line is not a rollout; names the line.
    """
    with Path(path).open("rb") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
                yield Rollout(
                    epoch=int(line["epoch"]),
                    step=int(line.get("step", line["epoch"])),
                    problem=str(line["problem"]),
                    sample=int(line.get("sample", 0)),
                    prompt_token_ids=tuple(map(int, line.get("prompt_token_ids", ()))),
                    token_ids=tuple(map(int, line["token_ids"])),
                )
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                raise DraftError(f"{path}, line {number} is not a recorded rollout ({error!r})") from error
