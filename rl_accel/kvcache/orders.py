"""What the KV cache learns from K of a calibration batch: the order of the rotation, and a shift.

A code's rounding error is step^2 / 12 in the mean, and a token of a head has one step for all its dims: its range over
the largest code. So whatever the order, the error of K is about the same in every dim of a token, and how strongly
queries weigh a dim multiplies the error of scores by the same factor for all orders. The order with the least error of
K is therefore the one with the least error of scores, and queries need not be looked at.

Left out: an order per head (pages of a layer have one), V (rotating it mostly hurts), and what is not linear in the
softmax. Cost: one store's arithmetic per order and token; a few thousand tokens are plenty.

Shape suffixes: N tokens, K KV heads, C head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rl_accel.errors import KVCacheError
from rl_accel.kernels.kv_int4.api import check_order
from rl_accel.kernels.kv_int4.layout import BITS
from rl_accel.kernels.kv_int4.reference import quantize, rotate

MIN_ORDER = 16
TIE = 0.02
"""Relative difference below which two errors are the same: another batch moves them by as much, and the smaller order
is the faster one. Sums are in float64, so threads move them by 1e-15."""


def allowed_orders(head_size: int) -> tuple[int, ...]:
    """Return the powers of two from 16 to the largest that divides the head size; that one alone if it is below 16."""
    largest = head_size & -head_size
    return tuple(1 << n for n in range(min(MIN_ORDER, largest).bit_length() - 1, largest.bit_length()))


def order_errors(k_NKC: torch.Tensor, orders: Sequence[int], bits: int = 4) -> dict[int, float]:
    """Return the error of K by order: squared, summed over dims, mean over tokens and heads.

    Args:
        k_NKC: floats of any device, after RoPE and less the shift if there is one.
        orders: powers of two that divide C; 1: no rotation.
        bits: of a code, 4 or 8.

    Raises:
        KVCacheError: for another order or number of bits, no tokens, or values that are not finite.
    """
    if bits not in BITS:
        raise KVCacheError(f"codes have 4 or 8 bits; got {bits}")
    if k_NKC.dim() != 3 or not k_NKC.numel():
        raise KVCacheError(f"K to choose an order by must be [tokens, KV heads, head size]; got {list(k_NKC.shape)}")
    if not k_NKC.isfinite().all():
        raise KVCacheError("K to choose an order by has values that are not finite")
    if not orders:
        raise KVCacheError("no orders to choose from")
    errors = {}
    for order in sorted(orders):
        check_order(order, k_NKC.shape[-1])
        rotated_NKC = rotate(k_NKC, order)
        codes_NKC, scales_NK, offsets_NK = quantize(rotated_NKC, (1 << bits) - 1)
        read_NKC = codes_NKC.double() * scales_NK.double()[..., None] + offsets_NK.double()[..., None]
        errors[order] = float((read_NKC - rotated_NKC.double()).square().sum(-1).mean())
    return errors


def choose_order(k_NKC: torch.Tensor, orders: Sequence[int], bits: int = 4) -> int:
    """Return the smallest order whose `order_errors` is the least or within `TIE` of it. Args and raises: as there."""
    errors = order_errors(k_NKC, orders, bits)
    smallest = min(errors.values())
    return min(order for order, error in errors.items() if error <= smallest * (1 + TIE))


def choose_shift(k_NKC: torch.Tensor) -> torch.Tensor:
    """Return the mean of K over tokens, float32 [K, C], to be subtracted before rotation.

    A shift adds the same to all scores of a query, which softmax does not see; what is left has a smaller range where
    dims have a mean (QKV biases, dims that RoPE hardly turns).

    Raises:
        KVCacheError: for no tokens, or values that are not finite.
    """
    if k_NKC.dim() != 3 or not k_NKC.shape[0]:
        raise KVCacheError(f"K to take the mean of must be [tokens, KV heads, head size]; got {list(k_NKC.shape)}")
    shift_KC = k_NKC.double().mean(0).float().contiguous()
    if not shift_KC.isfinite().all():
        raise KVCacheError("K to take the mean of has values that are not finite")
    return shift_KC
