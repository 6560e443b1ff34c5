"""How a sum of ranks is shared out among matrices of one shape.

    uniform     the same for all
    kurtosis    in proportion to excess kurtosis: heavy tails quantize badly (MiLo §3.3)
    frequency   in proportion to how often a router chose the expert (MiLo §3.3)

The sum is what `rank` times the number of matrices says, to the unit. Source: MiLo; differs: it has powers of two and
constants for two models, these hold for any. What is best for a number of bytes is `budget.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rl_accel.errors import MoEError


def uniform(count: int, rank: int) -> list[int]:
    return [rank] * count


def proportional(weights: Sequence[float], rank: int, max_rank: int) -> list[int]:
    """Return ranks whose mean is `rank`, in proportion to weights that are not negative.

    Args:
        weights: all zero counts as all equal.
        max_rank: of one matrix; what it leaves goes to the others.

    Raises:
        MoEError: for a weight that is negative or not finite, or more ranks than fit.
    """
    count, total = len(weights), rank * len(weights)
    if total > max_rank * count:
        raise MoEError(f"a mean rank of {rank} is more than these matrices have, {max_rank}")
    given = torch.tensor(weights, dtype=torch.float64)
    if not torch.isfinite(given).all() or (given < 0).any():
        raise MoEError(f"ranks are shared out by weights that are finite and not negative; got {list(weights)}")
    shares, full = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.bool)
    while not full.all() and (left := total - float(shares[full].sum())) > 0:
        part = torch.where(full, 0.0, given)
        part = part if part.sum() > 0 else (~full).double()
        shares = torch.where(full, shares, part / part.sum() * left)
        over = (shares > max_rank) & ~full
        if not over.any():
            break
        shares[over], full = float(max_rank), full | over
    ranks = shares.floor().long()
    for matrix in (shares - ranks).argsort(descending=True, stable=True)[: total - int(ranks.sum())].tolist():
        ranks[matrix] += 1
    return ranks.tolist()


def kurtosis(w_ENK: torch.Tensor, rank: int) -> list[int]:
    """Return ranks by the excess kurtosis of each matrix; below 0 counts as 0."""
    x = w_ENK.flatten(1).double()
    x = x - x.mean(-1, keepdim=True)
    found = x.pow(4).mean(-1) / x.pow(2).mean(-1).pow(2).clamp(min=1e-300) - 3
    return proportional(found.clamp(min=0).tolist(), rank, min(w_ENK.shape[1:]))


def frequency(counts: Sequence[float], rank: int, max_rank: int) -> list[int]:
    """Return ranks by how often each expert was chosen."""
    return proportional(counts, rank, max_rank)
