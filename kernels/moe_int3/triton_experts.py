"""Triton kernels of expert layers on packed weights: alignment, grouped GEMM with compensator, activation, reduction.

`gemm_kernel` holds 64 or 128 rows of one expert's matrix and BLOCK_M tokens of that expert and goes through all of K, a
group of weights at a time: unpacks codes, multiplies them with the tokens on tensor cores, and then adds

    acc += scale * (codes x) + offset' * sum(x)      codes less 2^(bits - 1), exact in float16 and bfloat16
    t   += v_scale * (v_codes x)                     the same tokens, already on chip
    acc += u_codes (u_scale t)                       once, after K

so no weight is ever rounded, and scaling costs BLOCK_M operations a row and group where scaling weights would cost 64.
Weights are the rows of the MMA and tokens its columns, of which a decoding step has few. sum(x) comes from
`group_sums_kernel` and `silu_kernel`.

A token's row depends on nothing but the token: K is never split, its order is fixed, no atomics, sums of groups come
from tiles of fixed shape. Across values of BLOCK_M the same products are added in the same order of groups; whether the
order within an MMA is the same is up to the GPU.

Left out: biases, other activations, splitting K where a matrix has few rows. Cost: the packed bytes of each expert
with tokens, once for each BLOCK_M of them; t is computed anew by every program, R / 64 or R / 128 of its products.

Shapes: N rows of a tile (64), M tokens, K weights of a group, R ranks, W words, P pairs (token, slot), T tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def align_kernel(
    pairs_ptr,  # int32 [blocks, BLOCK_M]: pairs, sorted by expert; -1: none
    experts_ptr,  # int32 [blocks]; -1: none
    ids_ptr,  # int32 [P]
    num_pairs,
    num_blocks,
    E: tl.constexpr,
    EP: tl.constexpr,  # power of two above E
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
):
    """A program for each expert, and one for the blocks that stay empty. Each counts all pairs, so none waits."""
    expert = tl.program_id(0)
    bins = tl.arange(0, EP)
    counts = tl.zeros((EP,), dtype=tl.int32)
    for start in range(0, num_pairs, TILE):
        pair = start + tl.arange(0, TILE)
        ids = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=-1)
        counts += tl.histogram(tl.where((ids < 0) | (ids >= E), E, ids), EP)
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    first_block = tl.sum(tl.where((bins < expert) & (bins < E), blocks, 0), axis=0)
    own = tl.sum(tl.where((bins == expert) & (bins < E), counts, 0), axis=0)
    if expert == E:
        for start in range(first_block, num_blocks, TILE):
            block = start + tl.arange(0, TILE)
            tl.store(experts_ptr + block, -1, mask=block < num_blocks)
        return
    rows_ptr = pairs_ptr + first_block * BLOCK_M
    seen = 0
    for start in range(0, num_pairs, TILE):
        pair = start + tl.arange(0, TILE)
        ids = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=-1)
        mine = (ids == expert).to(tl.int32)
        tl.store(rows_ptr + seen + tl.cumsum(mine, axis=0) - 1, pair, mask=mine > 0)
        seen += tl.sum(mine, axis=0)
    end = (own + BLOCK_M - 1) // BLOCK_M
    row = tl.arange(0, BLOCK_M)
    tl.store(rows_ptr + (end - 1) * BLOCK_M + row, -1, mask=(end > 0) & ((end - 1) * BLOCK_M + row >= own))
    for block in range(0, end):
        tl.store(experts_ptr + first_block + block, expert)


@triton.jit
def group_sums_kernel(
    sums_ptr,  # float32 [rows, groups]
    x_ptr,  # [rows, K]
    x_stride,
    groups,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sums of a row's groups; the tile's shape is fixed, so is the order."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    k = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(x_ptr + row * x_stride + k, mask=(group < groups)[:, None], other=0.0).to(tl.float32)
    tl.store(sums_ptr + row * groups + group, tl.sum(x, axis=1), mask=group < groups)


@triton.jit
def silu_kernel(
    out_ptr,  # [P, K]
    sums_ptr,  # float32 [P, groups]
    gate_up_ptr,  # [P, 2 K]
    ids_ptr,  # int32 [P]
    groups,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
):
    """silu(gate) * up, and the sums of its groups as the GEMM that follows sees it."""
    pair, group = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    if tl.load(ids_ptr + pair) < 0:
        return
    live = (group < groups)[:, None]
    k = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    length = groups * GROUP
    gate = tl.load(gate_up_ptr + pair * 2 * length + k, mask=live, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + pair * 2 * length + length + k, mask=live, other=0.0).to(tl.float32)
    h = (gate / (1.0 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + pair * length + k, h, mask=live)
    tl.store(sums_ptr + pair * groups + group, tl.sum(h.to(tl.float32), axis=1), mask=group < groups)


@triton.jit
def reduce_kernel(
    out_ptr,  # [T, N]
    y_ptr,  # [T * S, N], weights of the router in it
    ids_ptr,  # int32 [T * S]
    length,  # N
    S: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sum of a token's experts, slot by slot."""
    token, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE,), dtype=tl.float32)
    for slot in range(S):
        live = tl.load(ids_ptr + token * S + slot) >= 0
        total += tl.load(y_ptr + (token * S + slot) * length + n, mask=live & (n < length), other=0.0).to(tl.float32)
    tl.store(out_ptr + token * length + n, total.to(out_ptr.dtype.element_ty), mask=n < length)


@triton.jit
def _halves(pairs, ZERO: tl.constexpr, DTYPE: tl.constexpr):
    """Codes less ZERO of int32 with one in each half, exact: [..., 2]. In 16 bits by the number's bits: 1024 + code in
    float16, 128 + code in bfloat16."""
    if tl.float32 == DTYPE:
        values = tl.join((pairs & 0xFFFF).to(tl.float32), (pairs >> 16).to(tl.float32)) - ZERO
    else:
        half: tl.constexpr = tl.float16 == DTYPE
        pairs |= 0x64006400 if half else 0x43004300
        values = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16)).to(DTYPE, bitcast=True)
        values -= (1024.0 if half else 128.0) + ZERO
    return values


@triton.jit
def _unpack4(words, ZERO: tl.constexpr, DTYPE: tl.constexpr):  # int32 [N, W] -> [N, 8 W]
    """Words of 8 codes, pair p at bits 4 p and 16 + 4 p."""
    p0, p1 = _halves(words & 0x000F000F, ZERO, DTYPE), _halves((words >> 4) & 0x000F000F, ZERO, DTYPE)
    p2, p3 = _halves((words >> 8) & 0x000F000F, ZERO, DTYPE), _halves((words >> 12) & 0x000F000F, ZERO, DTYPE)
    return _order4(p0, p1, p2, p3)


@triton.jit
def _order4(p0, p1, p2, p3):  # [N, W, 2] each, pairs in order -> [N, 8 W]
    even, odd = tl.join(p0, p2), tl.join(p1, p3)  # [N, W, b, p // 2]
    both = tl.permute(tl.join(even, odd), (0, 1, 3, 4, 2))
    return tl.reshape(both, (p0.shape[0], p0.shape[1] * 8))


@triton.jit
def _pair(words, high, P: tl.constexpr, BITS: tl.constexpr):
    pair = (words >> (2 * P)) & 0x00030003
    if BITS == 3:
        pair |= (high >> P) & 0x00040004
    return pair


@triton.jit
def _unpack2(words, high, BITS: tl.constexpr, ZERO: tl.constexpr, DTYPE: tl.constexpr):  # int32 [N, W] -> [N, 16 W]
    """Words of 16 codes, pair p at bits 2 p and 16 + 2 p; bits of value 4 at bits p and 8 + p of `high`."""
    if BITS == 3:
        high = ((high & 0xFF) << 2) | ((high & 0xFF00) << 10)
    p0 = _halves(_pair(words, high, 0, BITS), ZERO, DTYPE)
    p1 = _halves(_pair(words, high, 1, BITS), ZERO, DTYPE)
    p2 = _halves(_pair(words, high, 2, BITS), ZERO, DTYPE)
    p3 = _halves(_pair(words, high, 3, BITS), ZERO, DTYPE)
    p4 = _halves(_pair(words, high, 4, BITS), ZERO, DTYPE)
    p5 = _halves(_pair(words, high, 5, BITS), ZERO, DTYPE)
    p6 = _halves(_pair(words, high, 6, BITS), ZERO, DTYPE)
    p7 = _halves(_pair(words, high, 7, BITS), ZERO, DTYPE)
    even = tl.join(tl.join(p0, p4), tl.join(p2, p6))  # [N, W, b, p // 4, p // 2 % 2]
    odd = tl.join(tl.join(p1, p5), tl.join(p3, p7))
    both = tl.permute(tl.join(even, odd), (0, 1, 3, 4, 5, 2))
    return tl.reshape(both, (words.shape[0], words.shape[1] * 16))


@triton.jit
def _load_weights(
    low_ptr, high_ptr, live, half, BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Codes less ZERO of a group, [N, GROUP], of rows that lie behind each other."""
    CODES: tl.constexpr = 8 if BITS == 4 else 16
    word = half * (GROUP // CODES) + tl.arange(0, GROUP // CODES)
    ptrs = tl.arange(0, live.shape[0])[:, None] * (64 // CODES) + word[None, :]
    words = tl.load(low_ptr + ptrs, mask=live[:, None], other=0)
    if BITS == 4:
        values = _unpack4(words, ZERO, DTYPE)
    elif BITS == 3:
        high = tl.load(high_ptr + ptrs, mask=live[:, None], other=0).to(tl.int32)
        values = _unpack2(words, high, BITS, ZERO, DTYPE)
    else:
        values = _unpack2(words, words, BITS, ZERO, DTYPE)
    return values


@triton.jit
def _add_group(
    acc, x, sums, low_ptr, high_ptr, affine_ptr, row, rows, half, BITS: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """Add the product of the 64 rows from `row` and the tokens over a group to float32 [N, M]. The pointers are those
    of row 0 in the group's block and group."""
    ZERO: tl.constexpr = 1 << (BITS - 1)
    WORDS: tl.constexpr = 8 if BITS == 4 else 4
    n = row + tl.arange(0, 64)
    live = n < rows
    first = row * WORDS
    w = _load_weights(low_ptr + first, high_ptr + first if BITS == 3 else None, live, half, BITS, GROUP, ZERO, x.dtype)
    affine = tl.load(affine_ptr + n, mask=live, other=0)
    scale = affine.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    offset = (affine >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) + scale * ZERO
    part = tl.dot(w, x, input_precision="ieee")
    acc += offset[:, None] * sums[None, :]
    acc += scale[:, None] * part
    return acc


@triton.jit
def _finish(
    acc, t, weight, out_ptr, pair, u_ptr, u_scales_ptr, first_rank, rank, rank_live, ranks, row, rows,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Add the compensator of 64 rows to float32 [N, M], multiply by the weights of the router, and store."""
    if t is not None:
        u_first = row // 64 * ranks + first_rank + rank
        word = tl.arange(0, 8)[None, :]
        words = tl.load(u_ptr + u_first[:, None] * 8 + word, mask=rank_live[:, None], other=0)
        u_scale = tl.load(u_scales_ptr + u_first, mask=rank_live, other=0.0)
        u = tl.trans(_unpack4(words, 8, DTYPE))  # [N, R]
        acc += tl.dot(u, (t * u_scale[:, None]).to(DTYPE), input_precision="ieee")
    if weight is not None:
        acc *= tl.expand_dims(weight, 0)
    n = row + tl.arange(0, 64)
    ptrs = out_ptr + pair.to(tl.int64)[None, :] * rows + n[:, None]
    tl.store(ptrs, acc.to(out_ptr.dtype.element_ty), mask=(n < rows)[:, None] & (pair >= 0)[None, :])


@triton.jit
def gemm_kernel(
    out_ptr,  # [P, N]
    x_ptr,  # [P / SHARED, K]
    sums_ptr,  # float32 [P / SHARED, groups]
    pairs_ptr,  # int32 [blocks, BLOCK_M]
    experts_ptr,  # int32 [blocks]
    weights_ptr,  # float32 [P] or None
    low_ptr,  # int32 [E, blocks of K, N, 4 or 8]
    high_ptr,  # int16 [E, blocks of K, N, 4] or None
    affine_ptr,  # int32 [E, groups, N]
    starts_ptr,  # int32 [E + 1] or None
    v_ptr,  # int32 [blocks of K, R, 8]
    v_scales_ptr,  # float32 [blocks of K, R]
    u_ptr,  # int32 [blocks of N, R, 8]
    u_scales_ptr,  # float32 [blocks of N, R]
    rows,  # N
    groups,
    blocks,  # of K
    ranks,  # of all experts
    x_stride,
    SHARED: tl.constexpr,  # pairs that share a row of x
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    RANK: tl.constexpr,  # the largest, filled up to an MMA's; 0: no compensators
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,  # of 64 rows, 1 or 2
    STAGES: tl.constexpr,
):
    WORDS: tl.constexpr = 8 if BITS == 4 else 4
    HALVES: tl.constexpr = 64 // GROUP
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    block_m, row = tl.program_id(1), tl.program_id(0) * (64 * TILES)
    expert = tl.load(experts_ptr + block_m).to(tl.int64)
    if expert < 0:
        return
    pair = tl.load(pairs_ptr + block_m * BLOCK_M + tl.arange(0, BLOCK_M))
    token_live = pair >= 0
    x_row = (pair // SHARED).to(tl.int64)
    x_ptrs = x_ptr + x_row[None, :] * x_stride + tl.arange(0, GROUP)[:, None]
    sums_ptrs = sums_ptr + x_row * groups
    low_ptr += expert * blocks * rows * WORDS
    if BITS == 3:
        high_ptr += expert * blocks * rows * WORDS
    affine_ptr += expert * groups * rows
    rank = tl.arange(0, max(RANK, 1))
    first_rank, rank_live, t = 0, rank < 0, None
    if RANK > 0:
        first_rank = tl.load(starts_ptr + expert)
        rank_live = rank < tl.load(starts_ptr + expert + 1) - first_rank
        t = tl.zeros((RANK, BLOCK_M), dtype=tl.float32)
    acc = tl.zeros((64, BLOCK_M), dtype=tl.float32)
    if TILES == 2:
        acc_2 = tl.zeros((64, BLOCK_M), dtype=tl.float32)
    for group in tl.range(0, groups, num_stages=STAGES):
        block, half = group // HALVES, group % HALVES
        x = tl.load(x_ptrs + group * GROUP, mask=token_live[None, :], other=0.0)  # [K, M]
        sums = tl.load(sums_ptrs + group, mask=token_live, other=0.0)
        if RANK > 0:
            v_first = block * ranks + first_rank + rank
            word = half * (GROUP // 8) + tl.arange(0, GROUP // 8)
            words = tl.load(v_ptr + v_first[:, None] * 8 + word[None, :], mask=rank_live[:, None], other=0)
            v_scale = tl.load(v_scales_ptr + v_first, mask=rank_live, other=0.0)
            t += v_scale[:, None] * tl.dot(_unpack4(words, 8, DTYPE), x, input_precision="ieee")
        low, high = low_ptr + block * rows * WORDS, high_ptr + block * rows * WORDS if BITS == 3 else None
        affine = affine_ptr + group * rows
        acc = _add_group(acc, x, sums, low, high, affine, row, rows, half, BITS, GROUP)
        if TILES == 2:
            acc_2 = _add_group(acc_2, x, sums, low, high, affine, row + 64, rows, half, BITS, GROUP)
    weight = None
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + pair, mask=token_live, other=0.0)
    _finish(acc, t, weight, out_ptr, pair, u_ptr, u_scales_ptr, first_rank, rank, rank_live, ranks, row, rows, DTYPE)
    if TILES == 2 and row + 64 < rows:
        _finish(
            acc_2, t, weight, out_ptr, pair, u_ptr, u_scales_ptr, first_rank, rank, rank_live, ranks, row + 64, rows,
            DTYPE,
        )  # fmt: skip
