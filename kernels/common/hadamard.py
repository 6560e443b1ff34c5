"""Hadamard transform of every block of values, in PyTorch: the specification. Source: Fino and Algazi (1976), the fast
transform in the natural (Hadamard) order; not normalized.

Every value is rounded once per stage, as in the C++ (`csrc/hadamard.hpp`) and Triton (`triton.py`), so all give the
same bits. Left out: orders that are not a power of two. Cost: log2(order) passes over memory.
"""

from __future__ import annotations

import torch


def hadamard(x: torch.Tensor, order: int) -> torch.Tensor:
    """Transform every `order` values along the last dimension: `hadamard(hadamard(x)) == order * x` up to rounding.

    Args:
        x: float [..., N], N a multiple of `order`.
        order: a power of two. Stages have strides 1, 2, 4, ..., order / 2.

    Returns:
        float [..., N].

    Raises:
        ValueError: for another order or length.
    """
    if order < 1 or order & (order - 1):
        raise ValueError(f"a Hadamard transform has a power of two as its order; got {order}")
    if x.shape[-1] % order:
        raise ValueError(f"expected a multiple of {order} values along the last dimension; got {x.shape[-1]}")
    shape, stride = x.shape, 1
    while stride < order:
        pairs = x.reshape(-1, 2, stride)
        first, second = pairs[:, 0], pairs[:, 1]
        x = torch.stack((first + second, first - second), dim=1)
        stride *= 2
    return x.reshape(shape)
