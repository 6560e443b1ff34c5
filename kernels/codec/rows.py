"""Many quantized blocks in one call of the codec: where each finds its values in a tensor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from rl_accel.errors import CommError


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
