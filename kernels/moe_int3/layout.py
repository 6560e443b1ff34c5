"""Layout of quantized matrices and their low-rank factors: what every backend agrees on.

A matrix has N rows (outputs) of K weights (inputs). Codes of `bits` (2, 3 or 4) are packed without waste in blocks of
64 along K, 8 `bits` bytes each:

    code k of a block lies in lane k % 8, at bit `bits` * (k // 8); lane l is the bytes l * bits .. (l + 1) * bits - 1

so the eight codes of a lane are one little-endian integer of 8 `bits` bits, and eight lanes of a vector hold eight
neighbors in memory. A weight is code * scale + offset; scale and offset are float16 and belong to a group of 32 or 64
neighbors along K. A row whose K is no multiple of 64 is filled up with codes of 0 that count for nothing.

A factor has rows of 4-bit codes in the same blocks, a float16 scale for each block, and the value
(code - 8) * scale. Of a compensator U V of rank r, V has r rows along K and U, transposed, r rows along N. The rows of
all experts follow each other, so experts may have different ranks and none takes more than its own.

Source: ours. MiLo packs 32 codes of 3 bits into 3 words likewise without waste, for tensor cores.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from rl_accel.errors import MoEError
from rl_accel.kernels.moe_int3.widths import (
    BITS,
    BLOCK,
    FACTOR_BITS,
    FACTOR_ZERO,
    GROUP_SIZES,
    LANES,
    MAX_FACTOR_CODE,
    check_width,
    num_blocks,
)

__all__ = [
    "BITS",
    "BLOCK",
    "FACTOR_BITS",
    "FACTOR_ZERO",
    "GROUP_SIZES",
    "LANES",
    "MAX_FACTOR_CODE",
    "Factors",
    "QuantizedMatrix",
    "check_width",
    "num_blocks",
]


@dataclass(frozen=True)
class QuantizedMatrix:
    """A batch of E quantized matrices [N, K], such as one projection of all experts of a layer."""

    codes: torch.Tensor
    """uint8 [E, N, blocks * 8 * bits]."""
    scales: torch.Tensor
    """float16 [E, N, K / group_size]."""
    offsets: torch.Tensor
    """float16 [E, N, K / group_size]."""
    bits: int
    group_size: int
    in_features: int
    """K."""

    @property
    def num_matrices(self) -> int:
        return self.codes.shape[0]

    @property
    def out_features(self) -> int:
        return self.codes.shape[1]

    def memory_bytes(self) -> int:
        return sum(x.nbytes for x in (self.codes, self.scales, self.offsets))

    def check_integrity(self) -> None:
        """Raise MoEError for a shape, dtype or width that the layout does not have."""
        check_width(self.bits, self.group_size, self.in_features)
        rows, groups = self.codes.shape[:2], self.in_features // self.group_size
        _check("codes", self.codes, torch.uint8, (*rows, num_blocks(self.in_features) * LANES * self.bits))
        _check("scales", self.scales, torch.float16, (*rows, groups))
        _check("offsets", self.offsets, torch.float16, (*rows, groups))


@dataclass(frozen=True)
class Factors:
    """Compensators U V of E matrices; matrix e has the rows starts[e] .. starts[e + 1] - 1 of both."""

    v_codes: torch.Tensor
    """uint8 [R, blocks of K * 32]; R is the sum of ranks."""
    v_scales: torch.Tensor
    """float16 [R, blocks of K]."""
    u_codes: torch.Tensor
    """uint8 [R, blocks of N * 32]: U transposed."""
    u_scales: torch.Tensor
    """float16 [R, blocks of N]."""
    starts: torch.Tensor
    """int32 [E + 1]."""

    def memory_bytes(self) -> int:
        return sum(getattr(self, field.name).nbytes for field in fields(self))

    def check_integrity(self, matrix: QuantizedMatrix) -> None:
        """Raise MoEError unless these are compensators of `matrix`."""
        rows = self.v_codes.shape[0]
        for name, length in (("v", matrix.in_features), ("u", matrix.out_features)):
            blocks = num_blocks(length)
            _check(f"{name}_codes", getattr(self, f"{name}_codes"), torch.uint8, (rows, blocks * LANES * FACTOR_BITS))
            _check(f"{name}_scales", getattr(self, f"{name}_scales"), torch.float16, (rows, blocks))
        _check("starts", self.starts, torch.int32, (matrix.num_matrices + 1,))
        starts = self.starts.tolist()
        if starts[0] != 0 or starts[-1] != rows or sorted(starts) != starts:
            raise MoEError(f"starts of compensators must rise from 0 to {rows} rows; got {starts}")


def _check(name: str, x: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if x.dtype != dtype or tuple(x.shape) != shape or not x.is_contiguous():
        raise MoEError(f"{name} must be contiguous {dtype} {list(shape)}; got {x.dtype} {list(x.shape)}")
