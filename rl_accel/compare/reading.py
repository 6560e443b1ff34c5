"""Reading files that a crash, a full disk or a bad copy may have left in any state.

Every reader of `compare` works inside `reading`: whatever a parser raises over damaged bytes (there are dozens of
types, RecursionError and zlib.error among them) leaves as one `CompareError` that names the file. Bounds on memory
are the readers' own: no size that a file announces is believed before it is checked against the file's length.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rl_accel.errors import CompareError

MAX_STEP = 2**31 - 1


@contextmanager
def reading(where: str | Path, kind: str) -> Iterator[None]:
    """Turn any failure of the block into a `CompareError`.

    Args:
        where: the file, and the place in it if known
        kind: what it should be, with its article: "a token file"

    Raises:
        CompareError: the block failed; its own CompareErrors pass unchanged.
    """
    try:
        yield
    except CompareError:
        raise
    except Exception as error:
        reason = " ".join(f"{error}".split())[:200]
        raise CompareError(f"{where} is not {kind}, or is damaged: {type(error).__name__}: {reason}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        CompareError: it is not such a file.
    """
    with reading(path, "a JSON object"):
        value = json.loads(path.read_bytes().decode("utf-8"))
        if not isinstance(value, dict):
            raise TypeError(f"it holds {type(value).__name__}")
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # half a surrogate pair cannot be printed
    return value


def parse_metrics_line(line: bytes, where: str) -> tuple[int, dict[str, float]]:
    """Read one line of verl's FileLogger.

    Returns:
        The step, and its metrics that are numbers; NaN for null, which is how orjson writes NaN and infinity.

    Raises:
        CompareError: it is not such a line.
    """
    with reading(where, "a metrics record"):
        # A run that goes on behind the torn line of one that was killed.
        record = json.loads(line[max(line.rfind(b'{"step"'), 0) :].decode("utf-8"))
        return check_step(record["step"]), numbers(record["data"].items())


def numbers(items: Iterable[tuple[str, Any]]) -> dict[str, float]:
    """Keep what is a number; a name that cannot be printed is an error.

    Raises:
        UnicodeEncodeError, OverflowError: for a name with half a surrogate pair, an integer beyond the floats.
    """
    found = {}
    for name, value in items:
        if value is None:
            found[name] = math.nan
        elif isinstance(value, int | float) or value in ("NaN", "Infinity", "-Infinity"):  # wandb's server
            found[name] = float(value)
    "".join(found).encode("utf-8")
    return found


def check_step(step: Any) -> int:
    """Return a step that can be one.

    Raises:
        ValueError: it cannot.
    """
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= MAX_STEP:
        raise ValueError(f"step is {step!r:.40}")
    return step
