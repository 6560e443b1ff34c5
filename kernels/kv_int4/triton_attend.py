"""Triton kernels of attention over quantized pages: the rows of `reference.attend`, bit for bit.

A program holds BLOCK_M rows, all query heads of a KV head for BLOCK_Q tokens of a request, and goes through one split
of 512 tokens, or through all of them in order; the first way needs `merge_kernel`, which merges splits in the same
order, so both give the same bits. It rotates and rounds the queries itself. Tokens and dims are the rows of the MMA and
queries its columns, of which 8 are enough: a decoding step has few, and what is computed of a score costs more than the
bytes.

Products are exact whatever the tile, so a row's bits do not depend on what shares it: K's codes and the two factors of
a query as int8 with sums in int32; V's codes and the two bytes of a weight as float16 with sums in float32 that stay
whole numbers below 2^23 (128 tokens * 255 * 255). Sums of floats have their order written out (`triton_math.py`).

Cost: C + 8 bytes a token and KV head with 4 bits, once per program that sees it; 16 tokens or dims of a word are 64
bytes in a row, and those of all words of 16 tokens of K one run of 8 C bytes: loads of 16 bytes a thread.

Shapes: M rows, T tokens of a tile (128), C dims up to a power of two, D codes of a word. Scores are [T, M].
"""

from __future__ import annotations

import triton
import triton.language as tl

from rl_accel.kernels.kv_int4.triton_math import decay, exp_neg, lane_sum, largest_magnitude, rotate, round_even

TILE = tl.constexpr(128)
SPLIT = tl.constexpr(512)
TINY = tl.constexpr(1e-30)


@triton.jit
def _find_request(query_start_ptr, block, num_requests, BLOCK_Q: tl.constexpr):
    """The request of a block of rows; request s begins at block query_start[s] // BLOCK_Q + s, so that every one has
    enough and neither grid nor lengths have to be known on the host."""
    low: tl.int32 = 0
    high = num_requests
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start_ptr + middle) // BLOCK_Q + middle <= block:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _rows(query_start_ptr, seq_lens_ptr, num_requests, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return of this program: the request, its number of queries; of its rows: query of the request, query head of the
    KV head, whether there is such a row, tokens that it sees."""
    BLOCK_Q: tl.constexpr = BLOCK_M // G
    block = tl.program_id(0)
    request = _find_request(query_start_ptr, block, num_requests, BLOCK_Q)
    start = tl.load(query_start_ptr + request)
    num_queries = tl.load(query_start_ptr + request + 1) - start
    row = tl.arange(0, BLOCK_M)
    query = (block - start // BLOCK_Q - request) * BLOCK_Q + row // G
    live = (row < BLOCK_Q * G) & (query < num_queries)
    visible = tl.load(seq_lens_ptr + request) - num_queries + query + 1
    return request, start + query, row % G, live, tl.where(live, visible, 0)


@triton.jit
def _round_query(x):  # float32 [M, C]
    """Return integers int32 [M, C] and what one stands for, float32 [M]."""
    largest = largest_magnitude(x, 1).to(tl.float32, bitcast=True)
    tiny = largest < TINY
    inverse = tl.where(tiny, 0.0, tl.div_rn(1.0, tl.where(tiny, 1.0, largest)) * 16256.0)
    scaled = x * inverse[:, None]
    finite = scaled == scaled
    integers = round_even(tl.minimum(tl.maximum(tl.where(finite, scaled, 0.0), -16256.0), 16256.0))
    return integers, tl.where(tiny, 0.0, largest * (1.0 / 16256.0))


@triton.jit
def _pages(table_ptr, block_stride, first, last, COUNT: tl.constexpr, SIZE: tl.constexpr, B: tl.constexpr):
    """Of the COUNT runs of SIZE tokens from token `first`: word at which the page of each begins, its number within the
    page, whether it is before `last`."""
    run = first // SIZE + tl.arange(0, COUNT)
    live = run * SIZE < last
    block = tl.load(table_ptr + run // (B // SIZE), mask=live, other=0)
    return block.to(tl.int64) * block_stride, run % (B // SIZE), live


@triton.jit
def _unpack(words, BITS: tl.constexpr):  # [A, B, 16] -> [A, B, 16, D]
    shifts = tl.arange(0, 32 // BITS) * BITS
    return (words[:, :, :, None] >> shifts[None, None, None, :]) & ((1 << BITS) - 1)


@triton.jit
def _load_k(pages_ptr, page, group, live, C: tl.constexpr, CP: tl.constexpr, BITS: tl.constexpr):
    """Codes of K, less 128 with 8 bits, int8 [T, C]."""
    D: tl.constexpr = 32 // BITS
    word = tl.arange(0, CP // D)[None, :, None]
    first = page + group * (C // D * 16)
    offsets = first[:, None, None] + (word * 16 + tl.arange(0, 16)[None, None, :])
    words = tl.load(pages_ptr + offsets, mask=live[:, None, None] & (word < C // D), other=0)
    codes = tl.reshape(tl.permute(_unpack(words, BITS), (0, 2, 1, 3)), (TILE, CP))
    return (codes if BITS == 4 else codes - 128).to(tl.int8)


@triton.jit
def _load_v(codes_ptr, page, group, live, C: tl.constexpr, CP: tl.constexpr, B: tl.constexpr, BITS: tl.constexpr):
    """Codes of V, float16 [C, T]."""
    D: tl.constexpr = 32 // BITS
    dims = tl.arange(0, CP // 16)[:, None, None]
    first = page + group * 16
    offsets = first[None, :, None] + (dims * (B // D * 16) + tl.arange(0, 16)[None, None, :])
    words = tl.load(codes_ptr + offsets, mask=live[None, :, None] & (dims < C // 16), other=0)
    codes = tl.reshape(tl.permute(_unpack(words, BITS), (0, 2, 1, 3)), (CP, TILE))
    # 1024 + code by its bits, exact; a conversion of integers would take four times as long.
    return (codes | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - 1024.0


@triton.jit
def _load_scales(scales_ptr, page, group, live, B: tl.constexpr):
    """Scales and offsets of a tile, float32 [T]."""
    ptrs = scales_ptr.to(tl.pointer_type(tl.float16)) + ((page * 2 + group * 16)[:, None] + tl.arange(0, 16)[None, :])
    scale = tl.load(ptrs, mask=live[:, None], other=0.0)
    offset = tl.load(ptrs + B, mask=live[:, None], other=0.0)
    return tl.reshape(scale, (TILE,)).to(tl.float32), tl.reshape(offset, (TILE,)).to(tl.float32)


@triton.jit
def _attend_tile(
    largest, total, offset, acc, query_high, query_low, query_sum, unit, visible, pages_ptr, table_ptr, block_stride,
    start, last, C: tl.constexpr, CP: tl.constexpr, B: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Add the tokens from `start` to the state of the rows: largest score, sums of weights, of weights times offsets
    ([M] each) and of weights times codes [C, M]."""
    CODE_WORDS: tl.constexpr = B * C * BITS // 32
    D: tl.constexpr = 32 // BITS
    page, group, live = _pages(table_ptr, block_stride, start, last, TILE // 16, 16, B)
    codes = _load_k(pages_ptr, page, group, live, C, CP, BITS)
    dots = (tl.dot(codes, query_high) << 7) + tl.dot(codes, query_low)
    if BITS == 8:
        dots += (query_sum << 7)[None, :]
    k_scale, k_offset = _load_scales(pages_ptr + CODE_WORDS, page, group, live, B)
    scores = (k_scale[:, None] * dots.to(tl.float32) + k_offset[:, None] * query_sum.to(tl.float32)[None, :]) * unit
    # What a row does not see may be anything, NaN too, so it is replaced and not multiplied by 0.
    seen = (start + tl.arange(0, TILE))[:, None] < visible[None, :]
    scores = tl.where(seen, scores, float("-inf"))
    new = tl.maximum(largest, tl.max(scores, axis=0))
    top = tl.where(new == float("-inf"), 0.0, new)  # no token of this split so far
    keep = decay(largest, top)
    p = exp_neg(scores - top[None, :])

    v_scale, v_offset = _load_scales(pages_ptr + (2 * CODE_WORDS + B), page, group, live, B)
    weights = tl.where(seen, p * v_scale[:, None], 0.0)
    w_max = tl.max(weights, axis=0)
    heavy = w_max >= TINY
    inverse = tl.div_rn(1.0, tl.where(heavy, w_max, 1.0)) * 32767.0
    integers = round_even(tl.where(weights == weights, weights, 0.0) * inverse[None, :])
    page, group, live = _pages(table_ptr, block_stride, start, last, TILE // D, D, B)
    values = _load_v(pages_ptr + (CODE_WORDS + B), page, group, live, C, CP, B, BITS)
    high = tl.dot(values, (integers >> 8).to(tl.float16)).to(tl.int32)
    low = tl.dot(values, (integers & 255).to(tl.float16)).to(tl.int32)
    sums = ((high << 8) + low).to(tl.float32)
    acc = acc * keep[None, :] + sums * tl.where(heavy, w_max * (1.0 / 32767.0), 0.0)[None, :]
    offset = offset * keep + lane_sum(tl.where(seen, p * v_offset[:, None], 0.0))
    total = total * keep + lane_sum(p)
    return new, total, offset, acc


@triton.jit
def _merge(largest, total, offset, acc, largest_b, total_b, offset_b, acc_b):
    """Merge the state of the next split; one of which a row sees nothing changes no bit."""
    new = tl.maximum(largest, largest_b)
    keep, take = decay(largest, new), decay(largest_b, new)
    acc = acc * keep[None, :] + acc_b * take[None, :]
    return new, total * keep + total_b * take, offset * keep + offset_b * take, acc


@triton.jit
def _store_rows(out_ptr, stride, token, head, live, total, offset, acc, C: tl.constexpr, CP: tl.constexpr):
    dim = tl.arange(0, CP)[:, None]
    out = tl.div_rn(acc + offset[None, :], tl.where(live, total, 1.0)[None, :])
    ptrs = out_ptr + (token.to(tl.int64) * stride + head * C)[None, :] + dim
    tl.store(ptrs, out.to(out_ptr.dtype.element_ty), mask=live[None, :] & (dim < C))


@triton.jit(do_not_specialize=["order", "num_requests", "num_rows", "num_splits", "table_stride"])
def attend_kernel(
    out_ptr,  # [N, H, C]
    parts_ptr,  # float32 [splits, N * H, C] and [splits, N * H, 3], or None
    query_ptr,  # [N, H, C]
    pages_ptr,  # int32 [blocks, K, PAGE], blocks at any stride
    table_ptr,  # int32 [S, blocks of a request]
    query_start_ptr,  # int32 [S + 1]
    seq_lens_ptr,  # int32 [S]
    order,  # int32, or a pointer to one
    scale,
    num_requests,
    num_rows,  # N * H
    num_splits,
    out_stride,
    query_stride,
    table_stride,
    block_stride,  # words
    ORDER_IN_MEMORY: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    STAGES: tl.constexpr,
    B: tl.constexpr,
    BITS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    request, token, head, live, visible = _rows(query_start_ptr, seq_lens_ptr, num_requests, G, BLOCK_M)
    kv_head = tl.program_id(1)
    last = tl.max(visible, axis=0)
    first_split, end_split = tl.program_id(2), tl.cdiv(last, SPLIT)
    if parts_ptr is not None:
        end_split = tl.minimum(end_split, first_split + 1)
    if first_split >= end_split:
        return
    if ORDER_IN_MEMORY:
        order = tl.load(order)
    head += kv_head * G
    dim = tl.arange(0, CP)[None, :]
    query_ptrs = query_ptr + token.to(tl.int64)[:, None] * query_stride + (head * C)[:, None] + dim
    query = tl.load(query_ptrs, mask=live[:, None] & (dim < C), other=0.0).to(tl.float32)
    integers, unit = _round_query(rotate(query, order, STAGES))
    unit = (unit * scale)[None, :]
    query_sum = tl.sum(integers, axis=1)
    query_high = tl.trans(((integers + 64) >> 7).to(tl.int8))
    query_low = tl.trans((((integers + 64) & 127) - 64).to(tl.int8))
    table_ptr += request.to(tl.int64) * table_stride
    pages_ptr += kv_head * PAGE

    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total, offset = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((CP, BLOCK_M), tl.float32)
    for split in range(first_split, end_split):
        largest_s = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total_s, offset_s = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
        acc_s = tl.zeros((CP, BLOCK_M), tl.float32)
        for start in range(split * SPLIT, tl.minimum(last, (split + 1) * SPLIT), TILE):
            largest_s, total_s, offset_s, acc_s = _attend_tile(
                largest_s, total_s, offset_s, acc_s, query_high, query_low, query_sum, unit, visible, pages_ptr,
                table_ptr, block_stride, start, last, C, CP, B, BITS,
            )  # fmt: skip
        largest, total, offset, acc = _merge(largest, total, offset, acc, largest_s, total_s, offset_s, acc_s)

    if parts_ptr is None:
        _store_rows(out_ptr, out_stride, token, head, live, total, offset, acc, C, CP)
    else:
        row = first_split.to(tl.int64) * num_rows + token * (K * G) + head
        dim = tl.arange(0, CP)[:, None]
        tl.store(parts_ptr + row[None, :] * C + dim, acc, mask=live[None, :] & (dim < C))
        state_ptrs = parts_ptr + num_splits.to(tl.int64) * num_rows * C + row * 3
        tl.store(state_ptrs, largest, mask=live)
        tl.store(state_ptrs + 1, total, mask=live)
        tl.store(state_ptrs + 2, offset, mask=live)


@triton.jit(do_not_specialize=["num_requests", "num_rows", "num_splits"])
def merge_kernel(
    out_ptr,
    parts_ptr,
    query_start_ptr,
    seq_lens_ptr,
    num_requests,
    num_rows,
    num_splits,
    out_stride,
    K: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Merge what `attend_kernel` wrote of each split, in order; arguments as there."""
    _, token, head, live, visible = _rows(query_start_ptr, seq_lens_ptr, num_requests, G, BLOCK_M)
    last = tl.max(visible, axis=0)
    if last <= 0:
        return
    head += tl.program_id(1) * G
    dim = tl.arange(0, CP)[:, None]
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total, offset = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((CP, BLOCK_M), tl.float32)
    for split in range(0, tl.cdiv(last, SPLIT)):
        row = num_rows.to(tl.int64) * split + token * (K * G) + head
        acc_s = tl.load(parts_ptr + row[None, :] * C + dim, mask=live[None, :] & (dim < C), other=0.0)
        state_ptrs = parts_ptr + num_splits.to(tl.int64) * num_rows * C + row * 3
        largest_s = tl.load(state_ptrs, mask=live, other=float("-inf"))
        total_s, offset_s = (
            tl.load(state_ptrs + 1, mask=live, other=0.0),
            tl.load(state_ptrs + 2, mask=live, other=0.0),
        )
        largest, total, offset, acc = _merge(largest, total, offset, acc, largest_s, total_s, offset_s, acc_s)
    _store_rows(out_ptr, out_stride, token, head, live, total, offset, acc, C, CP)
