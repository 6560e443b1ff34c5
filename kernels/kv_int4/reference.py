"""Quantized KV cache in PyTorch: the specification of store and attention, every rounding included.

Store: K is rotated (a Hadamard transform of every `order` values, times order^-1/2), V is not. Then per token and head
    offset = f16(min x);  scale = f16((max x - min x) / max_code);  code = clamp(rint((x - offset) / scale))
with the rounded scale and offset, so that a code is right for what is read. A value that is not finite makes scale
and offset NaN, and with them every result that sees the token.

Attention: everything is read from pages, the step's own tokens too. Queries are rotated likewise and rounded to
integers below 2^14 (two int8 factors of a dot product with unsigned codes), probabilities times the scale of V to 15
bits of the largest one of the tile, and both products are summed exactly in int32. Tiles are the tokens
[128 k, 128 k + 128) of the text, whatever is asked, so a row depends on nothing but its query and the pages that it
sees: not on other rows, the number of them, or where a step begins. Sums of floats run in 16 lanes, token i in lane
i % 16, then pairwise.

Left out: sliding windows, ALiBi, softcap, sinks, attention that is not causal. Cost: slow; others are compared with it.

Source: ours; per-token asymmetric INT4 with rotation: QuaRot, SAW-INT4; differs: an offset instead of a zero point,
integer products.

Shape suffixes: N tokens, H query heads, K KV heads, C head size, B block, R query rows of a request, T tokens of a
tile.
"""

from __future__ import annotations

import functools

import torch

from rl_accel.kernels.common.exp import exp_neg
from rl_accel.kernels.common.hadamard import hadamard
from rl_accel.kernels.kv_int4.layout import LANES, PageLayout

TILE = 128
"""Tokens between two looks at the largest score."""
SPLIT = 4 * TILE
"""Tokens whose sums begin anew, to be merged with those before them."""
MAX_QUERY = 127 * 128
"""Largest integer of a rounded query: 128 * high + low, high within an int8 and low within -64 .. 63."""
MAX_WEIGHT = 32767
"""Largest integer of a rounded weight, an int16."""
TINY = 1e-30
"""A query or the weights of a tile whose largest magnitude is below count as 0: their reciprocals could overflow."""


def quantize(x: torch.Tensor, max_code: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize along the last dimension.

    Args:
        x: float32 [..., C].

    Returns:
        Codes uint8 [..., C], scales and offsets float16 [...].
    """
    low, high = x.amin(-1) + 0.0, x.amax(-1) + 0.0  # which zero is the smallest is left open: no negative ones
    offset, scale = low.half(), ((high - low) / max_code).half()
    bad = ~(torch.isfinite(x).all(-1) & torch.isfinite(offset) & torch.isfinite(scale))
    divisor = scale.float().masked_fill(bad | (scale == 0), 1.0)
    codes = torch.round((x - offset.float()[..., None]) / divisor[..., None])
    codes = codes.masked_fill((bad | (scale == 0))[..., None], 0.0).clamp(0, max_code)
    return codes.to(torch.uint8), scale.masked_fill(bad, torch.nan), offset.masked_fill(bad, torch.nan)


def rotate(x: torch.Tensor, order: int) -> torch.Tensor:
    """Return float32 [..., C], every `order` values transformed to others of the same length; 1: as they are."""
    return hadamard(x.float(), order) * torch.tensor(order**-0.5) if order > 1 else x.float()


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 [..., codes per word] to bytes, uint8 [..., 4]."""
    shifts = torch.arange(codes.shape[-1], dtype=torch.int64) * bits
    words = (codes.long() << shifts).sum(-1)
    return torch.stack([(words >> (8 * i)) & 0xFF for i in range(4)], -1).to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack bytes, uint8 [..., 4], to codes uint8 [..., codes per word]."""
    words = torch.stack([packed[..., i].long() << (8 * i) for i in range(4)]).sum(0)
    shifts = torch.arange(32 // bits, dtype=torch.int64) * bits
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).to(torch.uint8)


def write_page(page: torch.Tensor, layout: PageLayout, k_BC, v_BC) -> None:
    """Write a whole page from quantized K and V.

    Args:
        page: uint8 [page_bytes].
        k_BC, v_BC: what `quantize` returned, of `block_size` tokens.
    """
    width = layout.codes_per_word
    for half, ((codes, scales, offsets), by_token) in enumerate(((k_BC, True), (v_BC, False))):
        part = page[half * layout.half_bytes : (half + 1) * layout.half_bytes]
        # K: [block / 16, 16 tokens, C / D, D] -> [block / 16, C / D, 16, D]; V: the same of the transposed codes.
        rows = codes if by_token else codes.T
        words = rows.reshape(-1, LANES, rows.shape[1] // width, width).transpose(1, 2)
        part[: layout.code_bytes] = pack(words, layout.bits).flatten()
        part[layout.code_bytes :] = torch.cat([scales, offsets]).view(torch.uint8)


def read_page(page: torch.Tensor, layout: PageLayout) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return K and V of a page as `quantize` did: codes [B, C], scales and offsets [B]."""
    found = []
    for half, by_token in enumerate((True, False)):
        part = page[half * layout.half_bytes : (half + 1) * layout.half_bytes]
        num_rows, width = (layout.block_size, layout.head_size)[:: 1 if by_token else -1]
        words = unpack(part[: layout.code_bytes].reshape(-1, 4), layout.bits)
        rows = (
            words.reshape(num_rows // LANES, -1, LANES, layout.codes_per_word).transpose(1, 2).reshape(num_rows, width)
        )
        scales, offsets = part[layout.code_bytes :].clone().view(torch.float16).chunk(2)
        found.append((rows if by_token else rows.T, scales, offsets))
    return found


def store(
    pages: torch.Tensor, layout: PageLayout, slots_N: torch.Tensor, k_NKC: torch.Tensor, v_NKC: torch.Tensor,
    order: int, shift_KC: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Write K and V of tokens to their slots; the rest of a page stays.

    Args:
        pages: uint8 [blocks, KV heads, page_bytes].
        slots_N: int64, block * block_size + position in it; negative: nothing is stored.
        k_NKC, v_NKC: floats, before rotation.
        order: of the rotation of K.
        shift_KC: float32, subtracted from every K before rotation, which adds the same to all scores of a query.
    """
    k_NKC = k_NKC.float() if shift_KC is None else k_NKC.float() - shift_KC
    k, v = quantize(rotate(k_NKC, order), layout.max_code), quantize(v_NKC.float(), layout.max_code)
    for n, slot in enumerate(slots_N.tolist()):
        if slot < 0:
            continue
        block, position = divmod(slot, layout.block_size)
        for head in range(pages.shape[1]):
            page = pages[block, head]
            parts = read_page(page, layout)
            for part, new in zip(parts, (k, v), strict=True):
                for old, value in zip(part, new, strict=True):
                    old[position] = value[n, head]
            write_page(page, layout, *parts)


def attend(
    pages: torch.Tensor, layout: PageLayout, blocks: list[int], query_RHC: torch.Tensor, seq_len: int, scale: float,
    order: int,
) -> torch.Tensor:  # fmt: skip
    """Return attention of the last R tokens of one request, float32 [R, H, C].

    Args:
        pages: uint8 [blocks, KV heads, page_bytes]; bytes behind `seq_len` may be anything.
        blocks: of the request, in the order of its text.
        query_RHC: of tokens seq_len - R .. seq_len - 1, before rotation; each sees the tokens up to its own.
        scale: of the scores.
        order: of the rotation of K.
    """
    num_rows, num_heads, _ = query_RHC.shape
    groups = num_heads // pages.shape[1]
    out = torch.empty_like(query_RHC, dtype=torch.float32)
    rotated = rotate(query_RHC, order)
    for kv_head in range(pages.shape[1]):
        parts = [read_page(pages[block, kv_head], layout) for block in blocks]
        (k, k_scale, k_offset), (v, v_scale, v_offset) = [
            tuple(torch.cat([part[half][i] for part in parts])[:seq_len] for i in range(3)) for half in range(2)
        ]
        for row in range(num_rows):
            visible = seq_len - num_rows + row + 1
            for head in range(kv_head * groups, (kv_head + 1) * groups):
                out[row, head] = _attend_row(
                    rotated[row, head],
                    (k[:visible], k_scale[:visible].float(), k_offset[:visible].float()),
                    (v[:visible], v_scale[:visible].float(), v_offset[:visible].float()),
                    scale,
                )
    return out


def attend_batch(
    out: torch.Tensor, query_NHC: torch.Tensor, pages: torch.Tensor, layout: PageLayout, block_table_SM: torch.Tensor,
    query_start_S1: torch.Tensor, seq_lens_S: torch.Tensor, scale: float, order: int,
) -> None:  # fmt: skip
    """Write `attend` of each request to its rows of `out`, as `api.attend`."""
    starts = query_start_S1.tolist()
    for blocks, start, end, seq_len in zip(
        block_table_SM.tolist(), starts[:-1], starts[1:], seq_lens_S.tolist(), strict=True
    ):
        if end > start:
            used = blocks[: -(-seq_len // layout.block_size)]
            out[start:end] = attend(pages, layout, used, query_NHC[start:end], seq_len, scale, order)


def round_query(query_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a query as integers, int64 [C], and what one of them stands for, float32."""
    largest = query_C.abs().amax()
    if largest < TINY:
        return torch.zeros_like(query_C, dtype=torch.int64), torch.zeros(())
    integers = torch.round(query_C * (largest.reciprocal() * MAX_QUERY)).nan_to_num(0.0)
    return integers.long(), largest * torch.tensor(1.0 / MAX_QUERY)


def _attend_row(query_C: torch.Tensor, k: tuple, v: tuple, scale: float) -> torch.Tensor:
    q_C, q_unit = round_query(query_C)
    unit, q_sum = q_unit * torch.tensor(scale, dtype=torch.float32), q_C.sum().float()
    parts = []
    for start in range(0, len(k[0]), SPLIT):
        split = slice(start, start + SPLIT)
        parts.append(_attend_split(q_C, q_sum, unit, tuple(x[split] for x in k), tuple(x[split] for x in v)))
    _, total, offset, acc_C = functools.reduce(_merge, parts)
    return (acc_C + offset) / total


def _attend_split(q_C: torch.Tensor, q_sum: torch.Tensor, unit: torch.Tensor, k: tuple, v: tuple) -> tuple:
    """Return the largest score, the sum of weights, of weights times offsets, and of weights times codes [C]."""
    largest, total, offset = torch.tensor(-torch.inf), torch.zeros(()), torch.zeros(())
    acc_C = torch.zeros(q_C.shape[0])
    for start in range(0, len(k[0]), TILE):
        tile = slice(start, start + TILE)
        dots_T = (k[0][tile].long() * q_C).sum(-1).float()
        scores_T = (k[1][tile] * dots_T + k[2][tile] * q_sum) * unit
        new = torch.maximum(largest, scores_T.amax())
        keep = _decay(largest, new)
        p_T = exp_neg(scores_T - new)
        weights_T = p_T * v[1][tile]
        w_max = weights_T.amax()
        if w_max >= TINY:
            integers_T = torch.round(weights_T * (w_max.reciprocal() * MAX_WEIGHT))
            sums_C = (integers_T.long()[:, None] * v[0][tile].long()).sum(0).float()
            added_C = sums_C * (w_max * torch.tensor(1.0 / MAX_WEIGHT))
        else:
            added_C = (w_max * 0.0).expand_as(acc_C)  # 0, or NaN
        acc_C = acc_C * keep + added_C
        offset = offset * keep + _lane_sum(p_T * v[2][tile])
        total = total * keep + _lane_sum(p_T)
        largest = new
    return largest, total, offset, acc_C


def _merge(first: tuple, second: tuple) -> tuple:
    largest = torch.maximum(first[0], second[0])
    keep, take = _decay(first[0], largest), _decay(second[0], largest)
    return (largest, *(a * keep + b * take for a, b in zip(first[1:], second[1:], strict=True)))


def _decay(largest: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return torch.zeros(()) if torch.isneginf(largest) else exp_neg((largest - new)[None])[0]


def _lane_sum(x_T: torch.Tensor) -> torch.Tensor:
    """Sum in 16 lanes, then pairwise."""
    lanes = torch.zeros(LANES)
    for start in range(0, len(x_T), LANES):
        part = x_T[start : start + LANES]
        lanes[: len(part)] = lanes[: len(part)] + part
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return lanes[0]
