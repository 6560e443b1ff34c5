"""Triton kernels of the communication codec: bit for bit what `reference.py` computes.

Every operation is one pass over memory; the values, the noise and the rotation stay in registers. Groups of more than
TILE values are read twice, the second time from the cache. Runs on CUDA on the current stream without waiting for it,
and on CPU under `TRITON_INTERPRET=1`. Not covered: tuning per GPU, other dtypes. Tiles, cost and bound: TRITON.md
beside this file.

Equality with the specification rests on three things: no fused multiply-add (`enable_fp_fusion=False` at each launch),
`div_rn` for the one division, and no flushing of denormals (Triton's default). `tests/kernels/test_codec_triton.py`
finds all three in the PTX.

Rows of blocks are the second axis of the grid; a table says per group where its values are in the tensor.

Shapes: N values, B bytes of one block, R blocks to sum, D rows. A tile is G groups of K runs of 32 values, held as two
halves [G, K, 16], values j and j + 16 of each run: the two nibbles of byte j, and the pairs of the last Hadamard stage.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

from rl_accel.kernels.codec.rows import Rows
from rl_accel.kernels.common.triton import hadamard_stage, mix32, rounding_noise

TILE = 4096
"""Values per program and pass."""
WARPS = 8
_LAUNCH = {"num_warps": WARPS, "enable_fp_fusion": False}
# Of type int64 and not specialized, so that a new key, step or number of groups compiles nothing anew.
_SCALARS = ["num_groups", "from_num_groups", "layer_bytes", "key", "offset"]


@triton.jit
def _rotate(low, high):
    low = hadamard_stage(hadamard_stage(hadamard_stage(hadamard_stage(low, 1), 2), 4), 8)
    high = hadamard_stage(hadamard_stage(hadamard_stage(hadamard_stage(high, 1), 2), 4), 8)
    return low + high, low - high


@triton.jit
def _load_half(x_ptr, subtract_ptr, offsets, mask):
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if subtract_ptr is not None:
        x -= tl.load(subtract_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def _load_values(x_ptr, subtract_ptr, starts, within, counts, HADAMARD: tl.constexpr):
    low = _load_half(x_ptr, subtract_ptr, starts + within, within < counts)
    high = _load_half(x_ptr, subtract_ptr, starts + within + 16, within + 16 < counts)
    if HADAMARD:
        low, high = _rotate(low, high)
    return low, high


@triton.jit
def _decode(block_ptr, num_groups, first, run, lane, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Halves of the runs of 32 values number `first + run` of one quantized block; zeros past its end."""
    RUNS: tl.constexpr = GROUP // 32  # per group
    num_groups = num_groups.to(tl.int64)
    mask = first + run < num_groups * RUNS
    scales_ptr = (block_ptr + num_groups * (GROUP * BITS // 8)).to(tl.pointer_type(tl.float32)) + first // RUNS
    scale = tl.load(scales_ptr + ((first % RUNS).to(tl.int32) + run) // RUNS, mask=mask, other=0.0)
    codes_ptr = block_ptr + first * (4 * BITS)
    if BITS == 4:
        pair = tl.load(tl.multiple_of(codes_ptr + (run * 16 + lane), (1, 1, 4)), mask=mask, other=0).to(tl.int32)
        low, high = (pair << 28) >> 28, (pair << 24) >> 28
    else:
        ptrs = tl.multiple_of(codes_ptr.to(tl.pointer_type(tl.int8)) + (run * 32 + lane), (1, 1, 4))
        low, high = tl.load(ptrs, mask=mask, other=0), tl.load(ptrs + 16, mask=mask, other=0)
    return low.to(tl.float32) * scale, high.to(tl.float32) * scale


@triton.jit
def _decode_sum(
    blocks_ptr, layer_bytes, num_groups, first, run, lane, R: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr
):
    low, high = _decode(blocks_ptr, num_groups, first, run, lane, BITS, GROUP)
    for _ in range(1, R):
        blocks_ptr += layer_bytes.to(tl.int64)
        next_low, next_high = _decode(blocks_ptr, num_groups, first, run, lane, BITS, GROUP)
        low += next_low
        high += next_high
    return low, high


@triton.jit
def _magnitude(low, high):
    """Bits of the larger magnitude of two halves; as integers, so that a NaN is the largest."""
    return tl.maximum(low.to(tl.int32, bitcast=True) & 0x7FFFFFFF, high.to(tl.int32, bitcast=True) & 0x7FFFFFFF)


@triton.jit
def _store_scales(scales_ptr, mask, magnitude, BITS: tl.constexpr):
    """Store the scales of the groups; return which of them have codes other than 0, and what makes values codes."""
    TOP: tl.constexpr = (1 << (BITS - 1)) - 1
    largest = tl.max(tl.max(magnitude, axis=2, keep_dims=True), axis=1, keep_dims=True)  # [G, 1, 1]
    finite = largest < 0x7F800000
    live = finite & (largest >= 0x0D800000)  # 2^-100
    largest = tl.where(live, largest, 0x3F800000).to(tl.float32, bitcast=True)
    scale = tl.where(live, (largest * (1.0 / TOP)).to(tl.int32, bitcast=True), 0)
    tl.store(scales_ptr, tl.where(finite, scale, 0x7FC00000), mask=mask)
    # Two roundings, as torch has in dividing a number by a tensor.
    return live, tl.div_rn(1.0, largest) * TOP


@triton.jit
def _code(x, inverse, index, high, key, BITS: tl.constexpr, STOCHASTIC: tl.constexpr):
    TOP: tl.constexpr = (1 << (BITS - 1)) - 1
    x = x * inverse
    if STOCHASTIC:
        x += rounding_noise(index, high, key.to(tl.uint32))
    # Adding 1.5 * 2^23 rounds half to even and leaves the integer in the low bits.
    code = (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    return tl.minimum(tl.maximum(code, -TOP), TOP)


@triton.jit
def _store_codes(
    codes_ptr,
    offsets,  # [G, K, 16]
    mask,  # [G, 1, 1]
    low,
    high,
    live,
    inverse,
    index,  # of the value at offset 0
    key,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    G: tl.constexpr,
):
    # Groups start at multiples of their size, so the high word of the index is one for all values of a group.
    group_index = index + tl.arange(0, G)[:, None, None] * GROUP
    mixed = mix32(((group_index ^ key) >> 32).to(tl.uint32))
    word = index.to(tl.uint32) + offsets.to(tl.uint32)
    low = _code(low, inverse, word, mixed, key, BITS, STOCHASTIC)
    high = _code(high, inverse, word + 16, mixed, key, BITS, STOCHASTIC)
    if BITS == 4:
        ptrs = tl.multiple_of(codes_ptr + (offsets // 32 * 16 + offsets % 32), (1, 1, 4))
        tl.store(ptrs, tl.where(live, (low & 15) | (high << 4), 0).to(tl.uint8), mask=mask)
    else:
        ptrs = tl.multiple_of(codes_ptr + offsets, (1, 1, 4))
        tl.store(ptrs, tl.where(live, low, 0).to(tl.uint8), mask=mask)
        tl.store(ptrs + 16, tl.where(live, high, 0).to(tl.uint8), mask=mask)


@triton.jit
def _offsets(G: tl.constexpr, K: tl.constexpr):  # [G, K, 16], of the low halves of a tile
    run = tl.arange(0, G)[:, None, None] * K + tl.arange(0, K)[None, :, None]
    return run * 32 + tl.arange(0, 16)[None, None, :]


@triton.jit(do_not_specialize=_SCALARS)
def _quantize_kernel(
    out_ptr,  # uint8 [D, B]
    x_ptr,  # [N]
    subtract_ptr,  # [N] or None
    starts_ptr,  # int64 [D * num_groups], or None: one row of all values
    counts_ptr,  # int32, values of each group; -1 leaves the group alone
    numel,
    num_groups: tl.int64,  # of a row
    key: tl.int64,
    offset: tl.int64,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    HADAMARD: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,  # times 32: GROUP, or a part of it if G is 1
):
    row = tl.program_id(1).to(tl.int64)
    first_group = tl.program_id(0).to(tl.int64) * G
    groups = first_group + tl.arange(0, G)[:, None, None]
    mask = groups < num_groups
    within = (tl.arange(0, K)[None, :, None] * 32) + tl.arange(0, 16)[None, None, :]
    if starts_ptr is None:
        x_ptr += first_group * GROUP
        if subtract_ptr is not None:
            subtract_ptr += first_group * GROUP
        starts = tl.arange(0, G)[:, None, None] * GROUP
        counts = tl.minimum(numel - groups * GROUP, GROUP).to(tl.int32)
    else:
        of_group = row * num_groups.to(tl.int64) + groups
        starts = tl.load(starts_ptr + of_group, mask=mask, other=0)
        counts = tl.load(counts_ptr + of_group, mask=mask, other=-1)
        mask &= counts >= 0

    low, high = _load_values(x_ptr, subtract_ptr, starts, within, counts, HADAMARD)
    magnitude = _magnitude(low, high)
    for start in range(K * 32, GROUP, K * 32):
        next_low, next_high = _load_values(x_ptr, subtract_ptr, starts, within + start, counts, HADAMARD)
        magnitude = tl.maximum(magnitude, _magnitude(next_low, next_high))

    out_ptr += row * num_groups.to(tl.int64) * (GROUP * BITS // 8 + 4)
    scales_ptr = (out_ptr + num_groups.to(tl.int64) * (GROUP * BITS // 8)).to(tl.pointer_type(tl.int32)) + groups
    live, inverse = _store_scales(scales_ptr, mask, magnitude, BITS)

    codes_ptr = out_ptr + first_group * (GROUP * BITS // 8)
    index = offset.to(tl.int64) + (row * num_groups.to(tl.int64) + first_group) * GROUP
    key = key.to(tl.int64)
    offsets = _offsets(G, K)
    _store_codes(codes_ptr, offsets, mask, low, high, live, inverse, index, key, BITS, GROUP, STOCHASTIC, G)
    for start in range(K * 32, GROUP, K * 32):
        low, high = _load_values(x_ptr, subtract_ptr, starts, within + start, counts, HADAMARD)
        _store_codes(codes_ptr, offsets + start, mask, low, high, live, inverse, index, key, BITS, GROUP, STOCHASTIC, G)


@triton.jit(do_not_specialize=_SCALARS)
def _dequantize_kernel(
    out_ptr,  # [N]
    blocks_ptr,  # uint8 [R, D, B]
    starts_ptr,  # int64 [D * num_groups], or None: one row of all values
    counts_ptr,  # int32, values of each group
    numel,
    num_groups: tl.int64,  # of a row
    layer_bytes: tl.int64,  # D * B
    R: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HADAMARD: tl.constexpr,
    ADD: tl.constexpr,
    G: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * G
    run = tl.arange(0, G)[:, None, None]
    lane = tl.arange(0, 16)[None, None, :]
    blocks_ptr += row * num_groups.to(tl.int64) * (GROUP * BITS // 8 + 4)
    low, high = _decode_sum(blocks_ptr, layer_bytes, num_groups, first, run, lane, R, BITS, GROUP)
    if HADAMARD:
        low, high = _rotate(low, high)
        low *= 0.03125
        high *= 0.03125
    if starts_ptr is None:
        offsets = _offsets(G, 1)
        out_ptr += first * 32
        remaining = tl.minimum(numel - first * 32, G * 32).to(tl.int32)
        _store_half(out_ptr + offsets, offsets < remaining, low, ADD)
        _store_half(out_ptr + offsets + 16, offsets + 16 < remaining, high, ADD)
    else:
        RUNS: tl.constexpr = GROUP // 32
        of_group = row * num_groups.to(tl.int64) + (first + run) // RUNS
        known = first + run < num_groups.to(tl.int64) * RUNS
        within = ((first + run) % RUNS).to(tl.int32) * 32 + lane
        ptrs = out_ptr + tl.load(starts_ptr + of_group, mask=known, other=0) + within
        counts = tl.load(counts_ptr + of_group, mask=known, other=-1)
        _store_half(ptrs, within < counts, low, ADD)
        _store_half(ptrs + 16, within + 16 < counts, high, ADD)


@triton.jit
def _store_half(out_ptrs, mask, x, ADD: tl.constexpr):
    if ADD:
        x = tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32) + x
    tl.store(out_ptrs, x.to(out_ptrs.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SCALARS)
def _requantize_kernel(
    out_ptr,  # uint8 [B]
    blocks_ptr,  # uint8 [R, B of the other format]
    num_groups: tl.int64,
    from_num_groups: tl.int64,
    key: tl.int64,
    offset: tl.int64,
    R: tl.constexpr,
    FROM_BITS: tl.constexpr,
    FROM_GROUP: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
):
    first_group = tl.program_id(0).to(tl.int64) * G
    first = first_group * (GROUP // 32)
    offsets = _offsets(G, K)
    run = tl.arange(0, G)[:, None, None] * K + tl.arange(0, K)[None, :, None]
    lane = tl.arange(0, 16)[None, None, :]

    layer_bytes = from_num_groups * (FROM_GROUP * FROM_BITS // 8 + 4)
    low, high = _decode_sum(blocks_ptr, layer_bytes, from_num_groups, first, run, lane, R, FROM_BITS, FROM_GROUP)
    magnitude = _magnitude(low, high)
    for start in range(K, GROUP // 32, K):
        next_low, next_high = _decode_sum(
            blocks_ptr, layer_bytes, from_num_groups, first + start, run, lane, R, FROM_BITS, FROM_GROUP
        )
        magnitude = tl.maximum(magnitude, _magnitude(next_low, next_high))

    groups = first_group + tl.arange(0, G)[:, None, None]
    mask = groups < num_groups
    scales_ptr = (out_ptr + num_groups.to(tl.int64) * (GROUP * BITS // 8)).to(tl.pointer_type(tl.int32)) + groups
    live, inverse = _store_scales(scales_ptr, mask, magnitude, BITS)

    codes_ptr = out_ptr + first_group * (GROUP * BITS // 8)
    index = offset.to(tl.int64) + first * 32
    key = key.to(tl.int64)
    _store_codes(codes_ptr, offsets, mask, low, high, live, inverse, index, key, BITS, GROUP, STOCHASTIC, G)
    for start in range(K, GROUP // 32, K):
        low, high = _decode_sum(
            blocks_ptr, layer_bytes, from_num_groups, first + start, run, lane, R, FROM_BITS, FROM_GROUP
        )
        _store_codes(
            codes_ptr, offsets + start * 32, mask, low, high, live, inverse, index, key, BITS, GROUP, STOCHASTIC, G
        )


def quantize(
    out_B: torch.Tensor,
    x_N: torch.Tensor,
    subtract_N: torch.Tensor | None,
    bits: int,
    group_size: int,
    stochastic: bool,
    key: int,
    offset: int,
    hadamard: bool,
) -> None:
    """Quantize `x - subtract`; arguments as `reference.quantize`."""
    num_groups = triton.cdiv(x_N.numel(), group_size)
    if num_groups:
        shape = 1, num_groups, None, None
        _launch_quantize(out_B, x_N, subtract_N, shape, bits, group_size, stochastic, key, offset, hadamard)


def quantize_rows(
    out_B: torch.Tensor,
    rows: Rows,
    x_N: torch.Tensor,
    subtract_N: torch.Tensor | None,
    bits: int,
    group_size: int,
    stochastic: bool,
    key: int,
    offset: int,
    hadamard: bool,
) -> None:
    """Quantize pieces of `x - subtract` into rows; arguments as `reference.quantize_rows`."""
    shape = rows.num_rows, rows.numel // group_size, *rows.groups(group_size, x_N.device)
    _launch_quantize(out_B, x_N, subtract_N, shape, bits, group_size, stochastic, key, offset, hadamard)


def _launch_quantize(out_B, x_N, subtract_N, shape, bits, group_size, stochastic, key, offset, hadamard) -> None:
    """`shape`: rows, groups of a row, and the table of `Rows.groups` or twice None."""
    num_rows, num_groups, starts_G, counts_G = shape
    G, K = _tile(group_size)
    with _device(out_B):
        _quantize_kernel[(triton.cdiv(num_groups, G), num_rows)](
            out_B,
            x_N,
            subtract_N,
            starts_G,
            counts_G,
            x_N.numel(),
            num_groups,
            _signed(key),
            offset,
            BITS=bits,
            GROUP=group_size,
            STOCHASTIC=stochastic,
            HADAMARD=hadamard,
            G=G,
            K=K,
            **_LAUNCH,
        )


def dequantize(
    out_N: torch.Tensor, blocks_RB: torch.Tensor, bits: int, group_size: int, hadamard: bool, add: bool
) -> None:
    """Write or add the sum of R blocks; arguments as `reference.dequantize`."""
    if out_N.numel():
        shape = 1, triton.cdiv(out_N.numel(), group_size), None, None
        _launch_dequantize(out_N, blocks_RB, shape, bits, group_size, hadamard, add)


def dequantize_rows(
    out_N: torch.Tensor, blocks_RDB: torch.Tensor, rows: Rows, bits: int, group_size: int, hadamard: bool, add: bool
) -> None:
    """Write or add the sums of R layers of rows; arguments as `reference.dequantize_rows`."""
    shape = rows.num_rows, rows.numel // group_size, *rows.groups(group_size, out_N.device)
    _launch_dequantize(out_N, blocks_RDB, shape, bits, group_size, hadamard, add)


def _launch_dequantize(out_N, blocks_RB, shape, bits, group_size, hadamard, add) -> None:
    num_rows, num_groups, starts_G, counts_G = shape
    # A single block may end before its last group does: no programs for what is not there.
    numel = out_N.numel() if starts_G is None else num_groups * group_size
    with _device(out_N):
        _dequantize_kernel[(triton.cdiv(numel, TILE), num_rows)](
            out_N,
            blocks_RB,
            starts_G,
            counts_G,
            out_N.numel(),
            num_groups,
            blocks_RB.shape[1],
            R=blocks_RB.shape[0],
            BITS=bits,
            GROUP=group_size,
            HADAMARD=hadamard,
            ADD=add,
            G=TILE // 32,
            **_LAUNCH,
        )


def requantize(
    out_B: torch.Tensor,
    blocks_RA: torch.Tensor,
    numel: int,
    from_bits: int,
    from_group_size: int,
    bits: int,
    group_size: int,
    stochastic: bool,
    key: int,
    offset: int,
) -> None:
    """Quantize the sum of R blocks anew; arguments as `reference.requantize`."""
    if not numel:
        return
    num_groups = triton.cdiv(numel, group_size)
    G, K = _tile(group_size)
    with _device(out_B):
        _requantize_kernel[(triton.cdiv(num_groups, G),)](
            out_B,
            blocks_RA,
            num_groups,
            triton.cdiv(numel, from_group_size),
            _signed(key),
            offset,
            R=blocks_RA.shape[0],
            FROM_BITS=from_bits,
            FROM_GROUP=from_group_size,
            BITS=bits,
            GROUP=group_size,
            STOCHASTIC=stochastic,
            G=G,
            K=K,
            **_LAUNCH,
        )


def _tile(group_size: int) -> tuple[int, int]:
    """Groups of a tile and runs of 32 values of each."""
    return max(1, TILE // group_size), min(TILE, group_size) // 32


def _signed(key: int) -> int:
    """The key as a 64-bit signed integer of the same bits, so that all keys share one compiled kernel."""
    return key - (1 << 64) if key >> 63 else key


def _device(x: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which may not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
