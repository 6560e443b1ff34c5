"""Device functions for Triton kernels: Hadamard stages and counter-based noise, bit for bit those of `hadamard.py` and
`noise.py` beside this file. Launch with `enable_fp_fusion=False`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix64(x):  # uint64; the SplitMix64 output function
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def mix32(word):  # uint32
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def rounding_noise(index, high, key):
    """Noise of values by the low words of their indices and of the key, uint32; `high` is mix32 of the high words."""
    word = index * 0x9E3779B9 + key
    word = ((word ^ (word >> 16)) * 0x7FEB352D) ^ high
    word = (word ^ (word >> 15)) * 0x846CA68B
    word = word ^ (word >> 16)
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08 - 0.5  # 2^-24


@triton.jit
def hadamard_stage(x, STRIDE: tl.constexpr):  # float32 [A, B, C]
    """One stage of the Hadamard transform along the last dimension. A reduction of two brings each value its partner: a
    shuffle in a warp, or nothing where one thread holds both. On the bits as integers, so that it is exact."""
    A: tl.constexpr = x.shape[0]
    B: tl.constexpr = x.shape[1]
    C: tl.constexpr = x.shape[2]
    bits = tl.reshape(x.to(tl.int32, bitcast=True), (A, B, C // (2 * STRIDE), 2, STRIDE))
    partner = tl.sum(bits, axis=3, keep_dims=True) - bits
    sign = (tl.arange(0, 2) << 31)[None, None, None, :, None]
    # partner + x for the first of two, partner - x for the second
    x = partner.to(tl.float32, bitcast=True) + (bits ^ sign).to(tl.float32, bitcast=True)
    return tl.reshape(x, (A, B, C))
