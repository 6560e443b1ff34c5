"""Layout of a quantized block: what every backend of the codec agrees on.

A block of N values is padded with zeros to whole groups and sent as one run of bytes:
    codes   N * bits / 8 bytes. 8 bits: int8, in order. 4 bits: byte j of each 32 values holds value j in its low and
            value j + 16 in its high nibble, two's complement.
    scales  one little-endian float32 per group
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from rl_accel.errors import CommError

BITS = (4, 8)
HADAMARD_BLOCK = 32
MIN_GROUP, MAX_GROUP = 32, 32768
TINY = 2.0**-100
"""A group whose largest magnitude is below this is sent as zeros; the reciprocal of its scale stays finite."""


def max_code(bits: int) -> int:
    """Largest code, 7 or 127; the range is symmetric."""
    return (1 << (bits - 1)) - 1


def padded(numel: int, group_size: int) -> int:
    """Values in the whole groups that hold `numel` values."""
    return -(-numel // group_size) * group_size


def packed_bytes(numel: int, bits: int, group_size: int) -> int:
    """Bytes of a block of `numel` values: codes and scales."""
    values = padded(numel, group_size)
    return values * bits // 8 + values // group_size * 4


@dataclass(frozen=True)
class Rows:
    """Where values of one tensor are in D blocks of the same size, the rows of a wire buffer: what one call of the
    codec packs for many receivers, or unpacks from many senders.

    Positions in rows are counted over all rows, row by row: value j of row d is d * numel + j.
    """

    num_rows: int
    """D."""
    numel: int
    """Values of a row: whole groups."""
    pieces_K4: torch.Tensor
    """int64 on the CPU, [K, (start, count, target, span)]: `count` values of the tensor from `start` on are those from
    position `target` on, zeros follow up to `target + span`. Of no two pieces do the spans overlap."""
    _tables: dict = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, num_rows: int, numel: int, pieces: Iterable[tuple[int, int, int, int]]) -> Rows:
        """Make it of (start, count, target, span)."""
        table = torch.tensor(list(pieces), dtype=torch.int64).view(-1, 4)
        return cls(num_rows, numel, table)

    @cached_property
    def min_tensor_numel(self) -> int:
        """Values that the tensor must have."""
        return int((self.pieces_K4[:, 0] + self.pieces_K4[:, 1]).max()) if len(self.pieces_K4) else 0

    def check_integrity(self, group_size: int) -> None:
        """Raise CommError unless pieces are whole groups of one row each and do not overlap."""
        start, count, target, span = self.pieces_K4.unbind(1)
        end = target + span
        order = target.argsort()
        good = [
            self.numel % group_size == 0,
            ((target % group_size == 0) & (span % group_size == 0)).all(),
            ((start >= 0) & (count >= 0) & (count <= span) & (target >= 0) & (span > 0)).all(),
            (end <= self.num_rows * self.numel).all(),
            (target // max(self.numel, 1) == (end - 1) // max(self.numel, 1)).all(),
            (end[order][:-1] <= target[order][1:]).all(),
        ]
        if not all(map(bool, good)):
            raise CommError(f"pieces of a row must be whole groups of {group_size}, inside one row, apart: {self}")

    def groups(self, group_size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return per group of all rows where its values start in the tensor, int64, and how many there are, int32;
        both [D * numel / group_size] on `device`, -1 values for a group that no piece covers. Kept for the next
        call."""
        key = group_size, device
        if key not in self._tables:
            num_groups = self.num_rows * self.numel // group_size
            starts_G = torch.zeros(num_groups, dtype=torch.int64)
            counts_G = torch.full((num_groups,), -1, dtype=torch.int32)
            for start, count, target, span in self.pieces_K4.tolist():
                where = slice(target // group_size, (target + span) // group_size)
                offsets = torch.arange(span // group_size) * group_size
                starts_G[where] = start + offsets
                counts_G[where] = (count - offsets).clamp(0, group_size).int()
            self._tables[key] = starts_G.to(device), counts_G.to(device)
        return self._tables[key]


def check_format(bits: int, group_size: int) -> None:
    """Raise CommError for bits other than 4 and 8 and for groups other than a power of two from 32 to 32,768."""
    if bits not in BITS:
        raise CommError(f"codes have 4 or 8 bits; got {bits}")
    if not MIN_GROUP <= group_size <= MAX_GROUP or group_size & (group_size - 1):
        raise CommError(f"group_size must be a power of two from {MIN_GROUP} to {MAX_GROUP}; got {group_size}")
