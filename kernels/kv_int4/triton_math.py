"""Device functions of the KV cache's Triton kernels: the rotation, exp, roundings and sums of `reference.py`, bit for
bit. Launch with `enable_fp_fusion=False`. Every sum of floats has its order written out, because the order in which
`tl.sum` adds depends on tile and number of warps."""

from __future__ import annotations

import triton
import triton.language as tl

from rl_accel.kernels.common.triton import hadamard_stage


@triton.jit
def rotate(x, order, STAGES: tl.constexpr):
    """Rotate float32 [M, C] in blocks of `order`, a value known at run time, at most 2^STAGES."""
    M: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    x = tl.reshape(x, (1, M, C))
    factor = 1.0
    for stage in tl.static_range(STAGES):
        x = tl.where(order > (1 << stage), hadamard_stage(x, 1 << stage), x)
        if stage % 2 == 0:  # the largest power of 2^-1/2 of the orders so far, rounded to float32
            factor = tl.where(order > (1 << stage), 0.7071067811865476 / (1 << (stage // 2)), factor)
        else:
            factor = tl.where(order > (1 << stage), 0.5 / (1 << (stage // 2)), factor)
    return tl.reshape(x * factor, (M, C))


@triton.jit
def largest_magnitude(x, axis: tl.constexpr):
    """Bits of it, int32: as integers, so that a NaN is the largest and infinity next to it."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=axis)


@triton.jit
def round_even(x):  # float32, magnitudes below 2^22
    """Adding 1.5 * 2^23 rounds half to even and leaves the integer in the low bits."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def exp_neg(x):  # float32 <= 0
    """exp(x); 0 below -87; NaN stays NaN."""
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    y = 1.9875691500e-4 * r + 1.3981999507e-3
    y = y * r + 8.3334519073e-3
    y = y * r + 4.1665795894e-2
    y = y * r + 1.6666665459e-1
    y = y * r + 5.0000001201e-1
    y = (y * (r * r) + r) + 1.0
    exponent = tl.where(x >= -87.0, n, 0.0).to(tl.int32)  # of NaN: 0
    y = y * ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < -87.0, 0.0, y)


@triton.jit
def decay(largest, new):
    """By how much sums shrink when the largest score becomes `new`."""
    return tl.where(largest == float("-inf"), 0.0, exp_neg(largest - new))


@triton.jit
def _split_pairs(x):  # [16, M, N] -> two [16, M, N / 2], the even and the odd of the last dimension
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // 2, 2)))


@triton.jit
def _add_halves(x):  # [N, M] -> [N / 2, M]; a sum of two has no order
    return tl.sum(tl.reshape(x, (2, x.shape[0] // 2, x.shape[1])), axis=0)


@triton.jit
def lane_sum(x):  # float32 [128, M] -> [M]
    """Sum in 16 lanes, token i in lane i % 16, then pairwise."""
    M: tl.constexpr = x.shape[1]
    even, odd = _split_pairs(tl.permute(tl.reshape(x, (8, 16, M)), (1, 2, 0)))
    x04, x26 = _split_pairs(even)
    x15, x37 = _split_pairs(odd)
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    lanes = (((((((0.0 + x0) + x1) + x2) + x3) + x4) + x5) + x6) + x7  # [16, M]
    return tl.sum(_add_halves(_add_halves(_add_halves(lanes))), axis=0)
