"""Where bytes take off most error: bits of every tensor and ranks of every matrix under one budget.

A tensor (one projection of all experts of a layer, or one linear layer) has 2, 3 or 4 bits; each matrix of it has its
own rank. For one width the codes leave a residual whose squared singular values are what each further rank takes off.
With a number of bytes as the unit of error (a Lagrange multiplier), every tensor takes the width and ranks that cost
least, and the multiplier is halved in until the bytes fit: the greedy gain per byte over all choices, without its traps
(a rank bought for 2 bits is lost with the step to 3). On narrow matrices ranks are expensive, and plain 4 bits win.

The error of a matrix is relative to its norm, times its weight (such as how often its expert is chosen). What the
alternation gains on top is the same few percent for all and left out.

Source: ours. Cost: per width a quantization and an SVD of every matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from rl_accel.errors import MoEError
from rl_accel.kernels.moe_int3 import api
from rl_accel.kernels.moe_int3.layout import BITS, BLOCK, FACTOR_BITS, LANES, num_blocks
from rl_accel.moe.bases import BASES

MAX_SPECTRUM = 128
"""Ranks that are looked at."""
STEPS = 60


@dataclass(frozen=True)
class TensorPlan:
    """Bits of a tensor and the rank of each of its matrices."""

    bits: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Curve:
    """What a tensor costs and loses at one width."""

    bits: int
    base_bytes: int
    rank_bytes: int
    """Of one more rank of one matrix."""
    error: float
    """Weighted relative squared error without ranks, summed over matrices."""
    gains_ER: torch.Tensor
    """What each further rank takes off, float64, not increasing along R."""

    def best(self, per_byte: float) -> tuple[float, int, list[int]]:
        """Return error, bytes and ranks where a byte counts as `per_byte` of error."""
        ranks = (self.gains_ER > per_byte * self.rank_bytes).sum(-1)
        kept = torch.arange(self.gains_ER.shape[1]) < ranks[:, None]
        error = self.error - float((self.gains_ER * kept).sum())
        return error, self.base_bytes + self.rank_bytes * int(ranks.sum()), ranks.tolist()


def curves(
    w_ENK: torch.Tensor, group_size: int, base: str = "ls", weights: Sequence[float] | None = None,
    bits: Sequence[int] = BITS,
) -> list[Curve]:  # fmt: skip
    """Return the curve of a tensor, float32, for each width."""
    num, rows, columns = w_ENK.shape
    weight_E = torch.ones(num, dtype=torch.float64) if weights is None else torch.tensor(weights, dtype=torch.float64)
    norm_E = w_ENK.double().pow(2).sum((1, 2)).clamp(min=1e-300)
    found = []
    for width in bits:
        matrix = BASES[base](w_ENK, width, group_size)
        residual = (w_ENK - api.dequantize(matrix)).double()
        count = min(MAX_SPECTRUM, rows, columns)
        spectrum = _squared_singular_values(residual, count) / norm_E[:, None] * weight_E[:, None]
        error = float((residual.pow(2).sum((1, 2)) / norm_E * weight_E).sum())
        found.append(Curve(width, matrix.memory_bytes(), rank_bytes(rows, columns), error, spectrum))
    return found


def rank_bytes(out_features: int, in_features: int) -> int:
    """Return the bytes of one rank of a compensator: codes, and a float16 scale per block."""
    return sum(num_blocks(length) * (BLOCK * FACTOR_BITS // LANES + 2) for length in (out_features, in_features))


def allocate(tensors: Mapping[str, list[Curve]], max_bytes: int) -> dict[str, TensorPlan]:
    """Return bits and ranks of every tensor that lose least in `max_bytes`.

    Raises:
        MoEError: if the smallest width without ranks does not fit.
    """
    smallest = sum(min(curve.base_bytes for curve in found) for found in tensors.values())
    if smallest > max_bytes:
        raise MoEError(f"a budget of {max_bytes} bytes is below the {smallest} that the smallest width takes")
    low, high = 0.0, max(curve.error for found in tensors.values() for curve in found)
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if _choose(tensors, middle)[1] > max_bytes else (low, middle)
    return _spend_rest(tensors, *_choose(tensors, high), max_bytes)


def _choose(tensors: Mapping[str, list[Curve]], per_byte: float) -> tuple[dict[str, tuple[Curve, list[int]]], int]:
    chosen, total = {}, 0
    for name, found in tensors.items():
        options = [(curve, *curve.best(per_byte)) for curve in found]
        curve, _, size, ranks = min(options, key=lambda o: o[1] + per_byte * o[2])
        chosen[name] = (curve, ranks)
        total += size
    return chosen, total


def _spend_rest(tensors, chosen: dict[str, tuple[Curve, list[int]]], total: int, max_bytes: int):
    """Add single ranks, best gain per byte first, as long as they fit."""
    wanted = sorted(
        (-float(curve.gains_ER[matrix, rank]) / curve.rank_bytes, name, matrix)
        for name, (curve, ranks) in chosen.items()
        for matrix, first in enumerate(ranks)
        for rank in range(first, min(first + 8, curve.gains_ER.shape[1]))
    )
    for _, name, matrix in wanted:
        curve, ranks = chosen[name]
        if total + curve.rank_bytes <= max_bytes:
            ranks[matrix] += 1
            total += curve.rank_bytes
    return {name: TensorPlan(curve.bits, tuple(ranks)) for name, (curve, ranks) in chosen.items()}


def _squared_singular_values(residual_ENK: torch.Tensor, count: int) -> torch.Tensor:
    small = residual_ENK.mT @ residual_ENK if residual_ENK.shape[2] <= residual_ENK.shape[1] else (
        residual_ENK @ residual_ENK.mT
    )  # fmt: skip
    return torch.linalg.eigvalsh(small).flip(-1)[..., :count].clamp(min=0)
