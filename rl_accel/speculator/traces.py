"""What the engine tells the trainer: a row per generated token, in a ring that forgets the oldest.

One writer, one reader, no lock: the writer never waits, and the reader notices when it was overtaken.
A row at position t has the policy's hidden states there, the token that was sampled from them and those before, and the
logits that it was sampled from, before the temperature. The first row of a verified draft also says how many of its
tokens were drafted and accepted.

Cost: a copy; 2 KB a row for a policy of width 128 with 436 tokens, 1 KB + 6 H bytes with a larger vocabulary.

Shape suffixes: R rows, A hidden states, N tokens of a row, V vocabulary, k kept entries of a distribution.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_accel.identity import RolloutIdentity, hash64
from rl_accel.speculator.shared import SharedBytes

DENSE_VOCAB = 4096
"""Up to so many tokens the distribution is kept whole."""
TOP_K = 64
"""Of a larger vocabulary: the most likely ones."""
VECTORS = ("tokens", "aux", "target", "target_ids")
"""Fields that are vectors, also where those have one entry."""
WRITTEN = 0
"""Word of the header: rows written since the start."""


@dataclass(frozen=True)
class RowLayout:
    """Fields of a row."""

    num_features: int
    """A = layers x width."""
    num_tokens: int
    vocab_size: int

    @property
    def dense(self) -> bool:
        return self.vocab_size <= DENSE_VOCAB

    def fields(self) -> dict[str, tuple[Any, int]]:
        """Return name -> dtype, entries a row."""
        fields: dict[str, tuple[Any, int]] = {
            "request": (np.int64, 1),
            "position": (np.int32, 1),
            "policy": (np.int32, 1),
            "draft": (np.int32, 1),
            "drafted": (np.int16, 1),
            "accepted": (np.int16, 1),
            "temperature": (np.float16, 1),
            "tokens": (np.int32, self.num_tokens),
            "aux": (np.float16, self.num_features),
            "target": (np.float16, self.vocab_size if self.dense else TOP_K),
        }
        if not self.dense:
            fields["target_ids"] = (np.int32, TOP_K)
        return fields

    @property
    def row_bytes(self) -> int:
        return sum(np.dtype(dtype).itemsize * count for dtype, count in self.fields().values())


def aux_layers(num_layers: int) -> tuple[int, ...]:
    """Return the layers after which hidden states are taken: a low one, a high one, and the last."""
    return tuple(sorted({max(num_layers // 4, 1), max(3 * num_layers // 4, 1), num_layers}))


def trace_name(identity: RolloutIdentity) -> int:
    """Return the name of a generation in traces, the same whether an engine or a training rank leaves them.

    Whether it is held out follows from it, so what is held out from one source is not learned from another.
    """
    parts = identity.step, identity.validate, identity.sample_index, identity.call, identity.problem_id
    return hash64("/".join(map(str, parts)).encode())


class TraceRing:
    """`capacity` rows of shared memory."""

    def __init__(self, layout: RowLayout, capacity: int, descriptor: int | None = None, name: str = "rl_accel-traces"):
        self.layout, self.capacity = layout, capacity
        self.memory = SharedBytes(capacity * layout.row_bytes, name, descriptor)
        self._fields: dict[str, npt.NDArray] = {}
        start = 0
        # The widest entries first, so that every field is aligned.
        for name, (dtype, count) in sorted(layout.fields().items(), key=lambda f: -np.dtype(f[1][0]).itemsize):
            end = start + capacity * count * np.dtype(dtype).itemsize
            rows = self.memory.data[start:end].view(dtype)
            self._fields[name] = rows.reshape(capacity, count) if name in VECTORS else rows
            start = end

    @property
    def num_written(self) -> int:
        return int(self.memory.words[WRITTEN])

    def put(self, rows: Mapping[str, npt.NDArray | int]) -> None:
        """Append rows; a plain number is meant for all of them. More than `capacity` at once: the last ones."""
        num_rows = len(rows["request"])  # type: ignore[arg-type]
        skipped = max(num_rows - self.capacity, 0)
        start = self.num_written + skipped
        for name, field in self._fields.items():
            values = rows[name]
            for where, part in self._parts(start, num_rows - skipped):
                field[where] = values[skipped:][part] if isinstance(values, np.ndarray) else values
        self.memory.words[WRITTEN] += num_rows

    def take(self, seen: int) -> tuple[int, dict[str, npt.NDArray], int]:
        """Return all rows after the first `seen`, as copies.

        Returns:
            Rows written by now, the rows, and how many were lost because they were overwritten before.
        """
        written = self.num_written
        start = max(seen, written - self.capacity)
        parts = self._parts(start, written - start)
        rows = {name: np.concatenate([field[where] for where, _ in parts]) for name, field in self._fields.items()}
        safe = self.num_written - self.capacity  # what the writer may have reached while this copied
        if safe > start:
            drop = min(safe - start, written - start)
            rows = {name: values[drop:] for name, values in rows.items()}
            start += drop
        return written, rows, start - seen

    def _parts(self, start: int, count: int) -> list[tuple[slice, slice]]:
        """Where rows start .. start + count lie, and which of them lie there."""
        first = start % self.capacity
        until_end = min(count, self.capacity - first)
        parts = [(slice(first, first + until_end), slice(0, until_end))]
        if until_end < count:
            parts.append((slice(0, count - until_end), slice(until_end, count)))
        return parts
