"""Triton kernel that quantizes K and V of tokens into their pages: the pages of `reference.store`, bit for bit.

A program stores K and V of one token of one KV head, in one launch for all. A word of V holds 8 tokens, so programs
share words. No program waits for another: each reads the word, finds the old code of its own token there, which nobody
else changes, and flips the bits that differ with one atomic xor. Xors of different bits commute, so the result is the
same in any order and whatever else the word held. With 8 bits a token's code is a byte of its own, and K's words,
scales and offsets belong to one token: plain stores.

Cost: reads N K C values twice (K and V), writes C + 8 bytes a token and head with 4 bits; C atomics of 4 bytes, 16 of
which are neighbors. Left out: two equal slots in one call, which no engine asks for.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rl_accel.kernels.kv_int4.triton_math import largest_magnitude, rotate, round_even


@triton.jit
def _quantize(x, valid, MAX_CODE: tl.constexpr):
    """Return codes int32 [C], and scale and offset as bits of float16, of float32 [C] where `valid`."""
    low, high = tl.min(tl.where(valid, x, float("inf")), axis=0), tl.max(tl.where(valid, x, float("-inf")), axis=0)
    finite = largest_magnitude(tl.where(valid, x, 0.0), 0) < 0x7F800000
    low, high = tl.where(finite, low, 0.0) + 0.0, tl.where(finite, high, 0.0) + 0.0  # no negative zeros
    offset, scale = low.to(tl.float16), tl.div_rn(high - low, MAX_CODE * 1.0).to(tl.float16)
    offset_bits, scale_bits = offset.to(tl.int16, bitcast=True), scale.to(tl.int16, bitcast=True)
    finite = finite & ((offset_bits & 0x7C00) != 0x7C00) & ((scale_bits & 0x7C00) != 0x7C00)
    live = finite & (scale_bits != 0)
    steps = tl.div_rn(x - offset.to(tl.float32), tl.where(live, scale.to(tl.float32), 1.0))
    # Clamped before rounding, which wants small numbers; half a step beyond the ends changes no code.
    codes = round_even(tl.minimum(tl.maximum(steps, 0.0), MAX_CODE * 1.0))
    return tl.where(live, codes, 0), tl.where(finite, scale_bits, 0x7E00), tl.where(finite, offset_bits, 0x7E00)


@triton.jit(do_not_specialize=["order"])
def store_kernel(
    pages_ptr,  # int32 [blocks, K, PAGE], blocks at any stride
    slots_ptr,  # int64 [N]
    k_ptr,  # [N, K, C]
    v_ptr,
    shift_ptr,  # float32 [K, C] or None
    order,  # int32, or a pointer to one
    k_stride,  # of tokens
    v_stride,
    block_stride,  # words
    ORDER_IN_MEMORY: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,  # C up to a power of two
    STAGES: tl.constexpr,
    B: tl.constexpr,
    BITS: tl.constexpr,
    PAGE: tl.constexpr,
):
    D: tl.constexpr = 32 // BITS
    MAX_CODE: tl.constexpr = (1 << BITS) - 1
    CODE_WORDS: tl.constexpr = B * C // D
    n = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots_ptr + n)
    if slot < 0:
        return
    if ORDER_IN_MEMORY:
        order = tl.load(order)
    position = (slot % B).to(tl.int32)
    page_ptr = pages_ptr + slot // B * block_stride + head * PAGE
    half_ptr = page_ptr + CODE_WORDS + B
    dim = tl.arange(0, CP)
    valid = dim < C

    k = tl.load(k_ptr + n * k_stride + head * C + dim, mask=valid, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        k -= tl.load(shift_ptr + head * C + dim, mask=valid, other=0.0)
    k = tl.reshape(rotate(tl.reshape(k, (1, CP)), order, STAGES), (CP,))
    codes, scale, offset = _quantize(k, valid, MAX_CODE)
    words = tl.sum(tl.reshape(codes, (CP // D, D)) << (tl.arange(0, D) * BITS)[None, :], axis=1)
    word = tl.arange(0, CP // D)
    first = position // 16 * (C // D * 16) + position % 16
    tl.store(page_ptr + first + word * 16, words, mask=word < C // D)
    _store_scale(page_ptr + CODE_WORDS, position, scale, offset, B)

    v = tl.load(v_ptr + n * v_stride + head * C + dim, mask=valid, other=0.0).to(tl.float32)
    codes, scale, offset = _quantize(v, valid, MAX_CODE)
    word_ptrs = half_ptr + (dim // 16 * (B // D) + position // D) * 16 + dim % 16
    if BITS == 8:
        tl.store(word_ptrs.to(tl.pointer_type(tl.int8)) + position % D, codes.to(tl.int8), mask=valid)
    else:
        bit = position % D * BITS
        old = (tl.load(word_ptrs, mask=valid, other=0) >> bit) & MAX_CODE
        tl.atomic_xor(word_ptrs, (old ^ codes) << bit, mask=valid, sem="relaxed")
    _store_scale(half_ptr + CODE_WORDS, position, scale, offset, B)


@triton.jit
def _store_scale(scales_ptr, position, scale, offset, B: tl.constexpr):
    scales_ptr = scales_ptr.to(tl.pointer_type(tl.int16)) + position
    tl.store(scales_ptr, scale.to(tl.int16))
    tl.store(scales_ptr + B, offset.to(tl.int16))
