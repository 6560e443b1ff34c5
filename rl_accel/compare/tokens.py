"""The rollouts of a step on disk, and the first token at which two runs diverge.

File `tokens/STEP.npz`, a row per response, rows in any order:
    problem_id     unicode [N]   which problem
    sample_index   int32 [N]     which of the problem's responses; (problem_id, sample_index) names a row
    prompt_length  int32 [N]     tokens of the prompt, which is not stored
    offsets        int64 [N + 1] row i is token_ids[offsets[i]:offsets[i + 1]]
    token_ids      int32 [sum of response lengths]

Leaves out: log-probabilities, and any alignment of rows by content: rows meet by name. Costs one step of
both runs in memory at a time.
"""

from __future__ import annotations

import io
import os
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rl_accel.compare.reading import reading
from rl_accel.errors import CompareError

MAX_BYTES = 2**31
"""Of a step's arrays together: half a billion tokens. A file that announces more is refused unread."""
DEFLATE_RATIO = 1032
"""The most that deflate shrinks anything; a file that announces more is damaged."""
_KINDS = {"problem_id": "U", "sample_index": "i4", "prompt_length": "i4", "offsets": "i8", "token_ids": "i4"}
"""Array -> kind of its elements, and their size where it is fixed."""


@dataclass(frozen=True)
class Row:
    """One response."""

    prompt_length: int
    token_ids: np.ndarray
    """int32 [response_length]"""


@dataclass(frozen=True)
class Divergence:
    """The first place where two runs' rollouts differ."""

    step: int
    problem_id: str
    sample_index: int
    reason: str
    """`token`, `length` (one response ends here), `prompt` (its length differs), `row` (on one side only)."""
    position: int | None
    """Offset from the start of the response; None for `prompt` and `row`."""
    token_a: int | None
    token_b: int | None
    rows_different: int
    """Rows of this step that differ anywhere."""
    rows: int
    """Rows of this step, of either side."""


@dataclass(frozen=True)
class TokenComparison:
    """How far two runs produced the same tokens."""

    steps: tuple[int, ...]
    """Steps that both runs have, in order."""
    steps_one_sided: tuple[int, ...]
    last_identical_step: int | None
    """The last step before the divergence (None: they diverge in the first)."""
    divergence: Divergence | None


def save_tokens(
    path: str | Path,
    problem_ids: Sequence[str],
    sample_indices: Sequence[int],
    prompt_lengths: Sequence[int],
    responses: Sequence[Sequence[int] | np.ndarray],
) -> None:
    """Write the rollouts of one step; the file appears whole or not at all.

    Args:
        path: `tokens/STEP.npz`; its folder is made.
        problem_ids: [N]
        sample_indices: [N], unique within a problem and step
        prompt_lengths: [N], tokens
        responses: [N] of int [response_length]

    Raises:
        CompareError: the lengths disagree, or two rows have the same name.
    """
    path = Path(path)
    sizes = {len(problem_ids), len(sample_indices), len(prompt_lengths), len(responses)}
    if len(sizes) != 1:
        raise CompareError(
            f"save_tokens({path.name}): problem_ids, sample_indices, prompt_lengths and responses must be of "
            f"one length; got {len(problem_ids)}, {len(sample_indices)}, {len(prompt_lengths)} and "
            f"{len(responses)}"
        )
    _check_names(path, problem_ids, sample_indices)
    lengths = np.fromiter((len(response) for response in responses), np.int64, len(responses))
    arrays = {
        "problem_id": np.asarray(problem_ids, dtype=np.str_),
        "sample_index": np.asarray(sample_indices, dtype=np.int32),
        "prompt_length": np.asarray(prompt_lengths, dtype=np.int32),
        "offsets": np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        "token_ids": np.concatenate([np.zeros(0, np.int32), *(np.asarray(r, np.int32) for r in responses)]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_tokens(path: Path) -> dict[tuple[str, int], Row]:
    """Read what `save_tokens` wrote, by (problem_id, sample_index).

    Raises:
        CompareError: the file is not such a file, or contradicts itself.
    """
    with reading(path, "a token file of rl_accel"):
        arrays = _read_arrays(path)
        offsets, token_ids = arrays["offsets"], arrays["token_ids"]
        names = [str(problem) for problem in arrays["problem_id"]]
        "".join(names).encode("utf-8")
    n = len(names)
    whole = len(arrays["sample_index"]) == len(arrays["prompt_length"]) == n and len(offsets) == n + 1
    if not whole or offsets[0] != 0 or offsets[-1] != len(token_ids) or np.any(offsets[1:] < offsets[:-1]):
        raise CompareError(f"{path} is damaged: its arrays do not describe {n} rows of {len(token_ids)} tokens")
    _check_names(path, names, arrays["sample_index"])
    return {
        (names[i], int(arrays["sample_index"][i])): Row(
            int(arrays["prompt_length"][i]), token_ids[offsets[i] : offsets[i + 1]]
        )
        for i in range(n)
    }


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz, none larger than what the file can hold."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.getinfo(f"{name}.npy") for name in _KINDS}
        announced = sum(member.file_size for member in members.values())
        if announced > min(MAX_BYTES, DEFLATE_RATIO * path.stat().st_size):
            raise ValueError(f"it announces {announced} bytes")
        return {name: _read_array(archive, member, _KINDS[name]) for name, member in members.items()}


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, kind: str) -> np.ndarray:
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("numpy compresses by deflate only")
    with archive.open(member) as file:
        data = io.BytesIO(file.read(member.file_size))
    if np.lib.format.read_magic(data) != (1, 0):
        raise ValueError("its arrays are not of numpy's format 1.0")
    shape, _, dtype = np.lib.format.read_array_header_1_0(data)
    size = len(data.getbuffer()) - data.tell()
    if dtype.str[1 : 1 + len(kind)] != kind or dtype.itemsize == 0 or len(shape) != 1:
        raise ValueError(f"{member.filename} holds {dtype.str} of shape {shape}")
    if shape[0] * dtype.itemsize != size:
        raise ValueError(f"{member.filename} announces {shape[0]} elements of {dtype.str} and holds {size} bytes")
    return np.frombuffer(data.getbuffer(), dtype, offset=data.tell())


def token_steps(directory: Path | None) -> dict[int, Path]:
    """The token files of a run, by step; empty without any."""
    if directory is None or not directory.is_dir():
        return {}
    return {int(path.stem): path for path in directory.glob("*.npz") if re.fullmatch(r"0|[1-9]\d{0,9}", path.stem)}


def compare_tokens(directory_a: Path | None, directory_b: Path | None) -> TokenComparison:
    """Find the first step, and in it the earliest position, at which two runs diverge.

    Only steps that both have are read, and none after the divergence.
    """
    files_a, files_b = token_steps(directory_a), token_steps(directory_b)
    steps = tuple(sorted(files_a.keys() & files_b.keys()))
    one_sided = tuple(sorted(files_a.keys() ^ files_b.keys()))
    last_identical = None
    for step in steps:
        divergence = first_divergence(step, load_tokens(files_a[step]), load_tokens(files_b[step]))
        if divergence is not None:
            return TokenComparison(steps, one_sided, last_identical, divergence)
        last_identical = step
    return TokenComparison(steps, one_sided, last_identical, None)


def first_divergence(
    step: int, rows_a: dict[tuple[str, int], Row], rows_b: dict[tuple[str, int], Row]
) -> Divergence | None:
    """The earliest difference in one step (by position, then by name), or None.

    A missing row and a different prompt come before any token.
    """
    found = []
    names = rows_a.keys() | rows_b.keys()
    for name in names:
        difference = _difference(rows_a.get(name), rows_b.get(name))
        if difference is not None:
            reason, position, token_a, token_b = difference
            found.append((-1 if position is None else position, name, reason, position, token_a, token_b))
    if not found:
        return None
    _, (problem, sample), reason, position, token_a, token_b = min(found, key=lambda item: item[:2])
    return Divergence(step, problem, sample, reason, position, token_a, token_b, len(found), len(names))


def _difference(a: Row | None, b: Row | None) -> tuple[str, int | None, int | None, int | None] | None:
    if a is None or b is None:
        return "row", None, None, None
    if a.prompt_length != b.prompt_length:
        return "prompt", None, None, None
    shared = min(len(a.token_ids), len(b.token_ids))
    unequal = np.flatnonzero(a.token_ids[:shared] != b.token_ids[:shared])
    if len(unequal):
        at = int(unequal[0])
        return "token", at, int(a.token_ids[at]), int(b.token_ids[at])
    if len(a.token_ids) != len(b.token_ids):
        ends = [int(row.token_ids[shared]) if len(row.token_ids) > shared else None for row in (a, b)]
        return "length", shared, ends[0], ends[1]
    return None


def _check_names(path: Path, problem_ids: Sequence[str], sample_indices: Sequence[int] | np.ndarray) -> None:
    seen: set[tuple[str, int]] = set()
    for problem, sample in zip(problem_ids, sample_indices, strict=True):
        name = (str(problem), int(sample))
        if name in seen:
            raise CompareError(
                f"{path.name}: two rows are named problem {name[0]!r}, sample {name[1]}; give every response "
                "of a step its own (problem_id, sample_index)"
            )
        seen.add(name)
