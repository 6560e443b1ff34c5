"""Triton kernels that quantize, dequantize and quantize factors: the codes of `reference.py`, bit for bit.

A program holds RUNS blocks of 64 weights in registers for all iterations, so memory is read once and written once. A
block is 8 parts of 8 lanes, weight k in lane k % 8 of part k // 8, a part being a tensor [RUNS, 8] of its own: the
eight codes of a lane are then at one position of the eight parts, packing takes shifts and no exchange, and a sum adds
parts in order, then lanes pairwise, as the specification has it. A group of 32 is the half of a block.

Equality rests on launches with `enable_fp_fusion=False`, on `div_rn` for divisions, on rounding by adding 1.5 * 2^23,
and on the order of sums, none of which depends on tile or warps; only the sign of an offset of zero may differ.

Left out: weights that are not float32; factors with values that are not finite. Cost: reads 4 bytes and writes
`bits` / 8 + 4 / group size bytes a weight. On sm_90 a warp takes 886 instructions for an iteration of 1024 weights and
3578 for the rest, of which half are another thread's too: see TRITON.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

RUNS = 64
"""Blocks of a program: 168 registers in 4 warps. Twice as many spill."""


@triton.jit
def _fold(lanes):  # float32 [R, 8] -> [R, 1]; sums of two have no order
    runs: tl.constexpr = lanes.shape[0]
    lanes = tl.sum(tl.reshape(lanes, (runs, 2, 4)), axis=1)
    lanes = tl.sum(tl.reshape(lanes, (runs, 2, 2)), axis=1)
    return tl.sum(lanes, axis=1, keep_dims=True)


@triton.jit
def _round_even(x):  # float32, magnitudes below 2^22
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _inverse(scale):
    """1 / scale; 0 for a scale of 0 or NaN."""
    return tl.where(scale > 0, tl.div_rn(1.0, tl.where(scale > 0, scale, 1.0)), 0.0)


@triton.jit
def _codes(x, inverse, offset, MAX_CODE: tl.constexpr):
    steps = (x - offset) * inverse
    steps = tl.where(steps == steps, steps, 0.0)
    return _round_even(tl.minimum(tl.maximum(steps, 0.0), MAX_CODE * 1.0))


@triton.jit
def _factor_codes(x, inverse):
    return _round_even(tl.minimum(tl.maximum(x * inverse, -8.0), 7.0))


@triton.jit
def _range_error(parts, scale, offset, MAX_CODE: tl.constexpr):
    inverse = _inverse(scale)
    difference = parts[0] - (_codes(parts[0], inverse, offset, MAX_CODE) * scale + offset)
    error = difference * difference
    for i in tl.static_range(1, len(parts)):
        difference = parts[i] - (_codes(parts[i], inverse, offset, MAX_CODE) * scale + offset)
        error = error + difference * difference
    return _fold(error)


@triton.jit
def _start(parts, MAX_CODE: tl.constexpr):
    """The best of four ranges: scale and offset, float32 [R, 1]."""
    low, high = parts[0], parts[0]
    for i in tl.static_range(1, len(parts)):
        low, high = tl.minimum(low, parts[i]), tl.maximum(high, parts[i])
    low, high = tl.min(low, axis=1, keep_dims=True), tl.max(high, axis=1, keep_dims=True)
    middle, half = (low + high) * 0.5, (high - low) * 0.5
    best_scale, best_offset = tl.zeros_like(low), low
    best = tl.full(low.shape, float("inf"), tl.float32)
    for i in tl.static_range(4):
        reach = half * tl.full(half.shape, 1.0 - i * 0.1, tl.float32)
        scale, offset = tl.div_rn(reach + reach, tl.full(half.shape, MAX_CODE * 1.0, tl.float32)), middle - reach
        error = _range_error(parts, scale, offset, MAX_CODE)
        better = error < best
        best = tl.where(better, error, best)
        best_scale, best_offset = tl.where(better, scale, best_scale), tl.where(better, offset, best_offset)
    return best_scale, best_offset


# Tuples below grow by `+` because Triton knows no stars, and mypy takes each for one of a fixed length.
@triton.jit
def _fit(parts, iterations, MAX_CODE: tl.constexpr):
    """Scale and offset of groups of `parts`, as float16 [R, 1], NaN where a weight or one of them is not finite; codes
    as a tuple of int32 [R, 8]."""
    N: tl.constexpr = len(parts) * 8.0
    bad = tl.zeros_like(parts[0]).to(tl.int32)
    for i in tl.static_range(len(parts)):
        bad |= ((parts[i].to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000).to(tl.int32)
    bad = tl.max(bad, axis=1, keep_dims=True) > 0
    clean = (tl.where(bad, 0.0, parts[0]),)
    x_sum = clean[0]
    for i in tl.static_range(1, len(parts)):
        clean = clean + (tl.where(bad, 0.0, parts[i]),)  # type: ignore[assignment]  # noqa: RUF005
        x_sum = x_sum + clean[i]
    x_sum = _fold(x_sum)
    scale, offset = _start(clean, MAX_CODE)
    for _ in range(iterations):
        inverse = _inverse(scale)
        q = _codes(clean[0], inverse, offset, MAX_CODE)
        q_sum, qq_sum, qx_sum = q, q * q, q * clean[0]
        for i in tl.static_range(1, len(parts)):
            q = _codes(clean[i], inverse, offset, MAX_CODE)
            q_sum, qq_sum, qx_sum = q_sum + q, qq_sum + q * q, qx_sum + q * clean[i]
        q_sum, qq_sum, qx_sum = _fold(q_sum), _fold(qq_sum), _fold(qx_sum)
        variance, covariance = qq_sum - q_sum * q_sum * (1.0 / N), qx_sum - q_sum * x_sum * (1.0 / N)
        fitted = tl.div_rn(covariance, tl.where(variance == 0, 1.0, variance))
        moves = (variance > 0) & (covariance > 0)
        scale = tl.where(moves, fitted, scale)
        offset = tl.where(moves, (x_sum - fitted * q_sum) * (1.0 / N), offset)
    half_scale, half_offset = scale.to(tl.float16), offset.to(tl.float16)
    bad = bad | ((half_scale.to(tl.int16, bitcast=True) & 0x7C00) == 0x7C00)
    bad = bad | ((half_offset.to(tl.int16, bitcast=True) & 0x7C00) == 0x7C00)
    inverse, offset = _inverse(half_scale.to(tl.float32)), half_offset.to(tl.float32)
    codes = (tl.where(bad, 0.0, _codes(clean[0], inverse, offset, MAX_CODE)).to(tl.int32),)
    for i in tl.static_range(1, len(parts)):
        code = _codes(clean[i], inverse, offset, MAX_CODE)
        codes = codes + (tl.where(bad, 0.0, code).to(tl.int32),)  # type: ignore[assignment]  # noqa: RUF005
    nan = float("nan")
    return tl.where(bad, nan, half_scale), tl.where(bad, nan, half_offset), codes


@triton.jit
def _load_parts(x_ptr, row, block, rows, length):
    """The parts of blocks, zeros behind `length`."""
    start = row.to(tl.int64) * length
    parts = ()
    for i in tl.static_range(8):
        k = block * 64 + i * 8 + tl.arange(0, 8)[None, :]
        part = tl.load(x_ptr + start + k, mask=(row < rows) & (k < length), other=0.0)
        parts = parts + (part,)  # type: ignore[assignment]  # noqa: RUF005
    return parts


@triton.jit
def _store_lanes(codes_ptr, run, live, codes, BITS: tl.constexpr):
    """Store the lanes of blocks, eight codes of each, BITS bytes."""
    lanes = codes[0]
    for i in tl.static_range(1, 8):
        lanes |= codes[i] << (i * BITS)
    ptrs = codes_ptr + (run.to(tl.int64) * 8 + tl.arange(0, 8)[None, :]) * BITS
    if BITS == 4:
        tl.store(ptrs.to(tl.pointer_type(tl.int32)), lanes, mask=live)
    elif BITS == 2:
        tl.store(ptrs.to(tl.pointer_type(tl.int16)), lanes.to(tl.int16), mask=live)
    else:
        for i in tl.static_range(3):
            tl.store(ptrs + i, (lanes >> (8 * i)).to(tl.uint8), mask=live)


@triton.jit
def load_lane(ptrs, live, BITS: tl.constexpr):
    """Eight codes at BITS neighboring bytes: int32 of the shape of `ptrs`, which are multiples of BITS."""
    if BITS == 4:
        lanes = tl.load(ptrs.to(tl.pointer_type(tl.int32)), mask=live, other=0)
    elif BITS == 2:
        lanes = tl.load(ptrs.to(tl.pointer_type(tl.int16)), mask=live, other=0).to(tl.int32)
    else:
        lanes = tl.load(ptrs, mask=live, other=0).to(tl.int32)
        lanes |= tl.load(ptrs + 1, mask=live, other=0).to(tl.int32) << 8
        lanes |= tl.load(ptrs + 2, mask=live, other=0).to(tl.int32) << 16
    return lanes


@triton.jit
def quantize_kernel(
    codes_ptr,  # uint8 [rows, blocks * 8 * BITS]
    scales_ptr,  # float16 [rows, K / GROUP]
    offsets_ptr,
    x_ptr,  # float32 [rows, K]
    rows,
    length,  # K
    blocks,
    iterations,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    RUNS: tl.constexpr,
):
    MAX_CODE: tl.constexpr = (1 << BITS) - 1
    run = (tl.program_id(0).to(tl.int64) * RUNS + tl.arange(0, RUNS))[:, None]
    row, block = run // blocks, (run % blocks).to(tl.int32)
    parts = _load_parts(x_ptr, row, block, rows, length)
    groups = length // GROUP
    first = row * groups + block * (64 // GROUP)
    if GROUP == 64:
        scale, offset, codes = _fit(parts, iterations, MAX_CODE)
        tl.store(scales_ptr + first, scale, mask=row < rows)
        tl.store(offsets_ptr + first, offset, mask=row < rows)
    else:
        scale, offset, codes = _fit((parts[0], parts[1], parts[2], parts[3]), iterations, MAX_CODE)
        tl.store(scales_ptr + first, scale, mask=row < rows)
        tl.store(offsets_ptr + first, offset, mask=row < rows)
        scale, offset, more = _fit((parts[4], parts[5], parts[6], parts[7]), iterations, MAX_CODE)
        live = (row < rows) & (block * 2 + 1 < groups)
        tl.store(scales_ptr + first + 1, scale, mask=live)
        tl.store(offsets_ptr + first + 1, offset, mask=live)
        codes = codes + more
    _store_lanes(codes_ptr, run, row < rows, codes, BITS)


@triton.jit
def quantize_factor_kernel(
    codes_ptr,  # uint8 [rows, blocks * 32]
    scales_ptr,  # float16 [rows, blocks]
    x_ptr,  # float32 [rows, length]
    rows,
    length,
    blocks,
    iterations,
    RUNS: tl.constexpr,
):
    run = (tl.program_id(0).to(tl.int64) * RUNS + tl.arange(0, RUNS))[:, None]
    row, block = run // blocks, (run % blocks).to(tl.int32)
    parts = _load_parts(x_ptr, row, block, rows, length)
    largest = tl.abs(parts[0])
    for i in tl.static_range(1, 8):
        largest = tl.maximum(largest, tl.abs(parts[i]))
    largest = tl.max(largest, axis=1, keep_dims=True)
    scale = tl.div_rn(largest, tl.full(largest.shape, 7.5, tl.float32))
    for _ in range(iterations):
        inverse = _inverse(scale)
        q = _factor_codes(parts[0], inverse)
        qq_sum, qx_sum = q * q, q * parts[0]
        for i in tl.static_range(1, 8):
            q = _factor_codes(parts[i], inverse)
            qq_sum, qx_sum = qq_sum + q * q, qx_sum + q * parts[i]
        qq_sum, qx_sum = _fold(qq_sum), _fold(qx_sum)
        fitted = tl.div_rn(qx_sum, tl.maximum(qq_sum, 1.0))
        scale = tl.where((qq_sum > 0) & (qx_sum > 0), fitted, scale)
    half_scale = scale.to(tl.float16)
    inverse = _inverse(half_scale.to(tl.float32))
    codes = ()
    for i in tl.static_range(8):
        k = block * 64 + i * 8 + tl.arange(0, 8)[None, :]
        # Behind the end the layout has codes of 0, not of the value 0.
        code = tl.where(k < length, _factor_codes(parts[i], inverse) + 8.0, 0.0)
        codes = codes + (code.to(tl.int32),)  # type: ignore[assignment]  # noqa: RUF005
    tl.store(scales_ptr + run, half_scale, mask=row < rows)
    _store_lanes(codes_ptr, run, row < rows, codes, 4)


@triton.jit
def dequantize_kernel(
    out_ptr,  # float32 [rows, K]
    codes_ptr,
    scales_ptr,
    offsets_ptr,
    rows,
    length,
    blocks,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    RUNS: tl.constexpr,
):
    run = (tl.program_id(0).to(tl.int64) * RUNS + tl.arange(0, RUNS))[:, None]
    row, block = run // blocks, (run % blocks).to(tl.int32)
    lanes = load_lane(codes_ptr + (run * 8 + tl.arange(0, 8)[None, :]) * BITS, row < rows, BITS)
    first = row * (length // GROUP)
    for i in tl.static_range(8):
        k = block * 64 + i * 8 + tl.arange(0, 8)[None, :]
        live = (row < rows) & (k < length)
        group = first + k // GROUP
        scale = tl.load(scales_ptr + group, mask=live, other=0.0).to(tl.float32)
        offset = tl.load(offsets_ptr + group, mask=live, other=0.0).to(tl.float32)
        code = ((lanes >> (i * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
        tl.store(out_ptr + row * length + k, code * scale + offset, mask=live)
