"""Quantizer and packed expert layers in PyTorch: the specification, every rounding included.

Quantizer (`quantize`): per group of n weights, scale s and offset b that make sum (x - s q - b)^2 small.
    start      the best of the ranges of the group times 1, 0.9, 0.8 and 0.7 about its middle
    repeat     q = clamp(rint((x - b) / s)); s, b = least squares of x on q
    round      s and b to float16, then q once more with these
Neither step can raise the error before the rounding, and once no code changes nothing changes: iterations that follow
may be left out. A group with a value that is not finite gets NaN for scale and offset.

Layers: y = W^ x + U^ (V^ x). Sums run over K in 8 lanes, weight k in lane k % 8, by fused multiply-add, then pairwise;
the compensator is added row by row after. So a token's result depends on the token alone, not on others in the batch or
on threads.

Left out: biases, activations other than SiLU with a gate. Cost: slow; other backends are compared with it.

Source: least squares in turn is Lloyd's algorithm with evenly spaced levels; ranges to start from as in common
clipping searches; the compensator: MiLo §3. Differs: scales of the codes are fitted, not taken from the range.

Shape suffixes: E matrices, N rows, K weights of a row, G groups, R rank, T tokens, S experts of a token.
"""

from __future__ import annotations

import torch

from rl_accel.kernels.common.exp import silu
from rl_accel.kernels.moe_int3.layout import (
    BLOCK,
    FACTOR_BITS,
    FACTOR_ZERO,
    LANES,
    MAX_FACTOR_CODE,
    Factors,
    QuantizedMatrix,
    num_blocks,
)

RANGES = (1.0, 0.9, 0.8, 0.7)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes, uint8 [..., K], to uint8 [..., blocks * 8 * bits]."""
    length = codes.shape[-1]
    codes = torch.nn.functional.pad(codes, (0, num_blocks(length) * BLOCK - length))
    lanes = codes.unflatten(-1, (-1, BLOCK // LANES, LANES)).transpose(-1, -2).long()  # [..., blocks, lane, 8]
    words = (lanes << (torch.arange(8) * bits)).sum(-1)
    return torch.stack([(words >> (8 * i)) & 255 for i in range(bits)], -1).to(torch.uint8).flatten(-3)


def unpack(packed: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """Undo `pack`: uint8 [..., length]."""
    parts = packed.unflatten(-1, (-1, LANES, bits)).long()
    words = (parts << (torch.arange(bits) * 8)).sum(-1)
    codes = (words[..., None] >> (torch.arange(8) * bits)) & ((1 << bits) - 1)  # [..., blocks, lane, 8]
    return codes.transpose(-1, -2).flatten(-3)[..., :length].to(torch.uint8)


def quantize(w_ENK: torch.Tensor, bits: int, group_size: int, iterations: int) -> QuantizedMatrix:
    """Quantize float32 [E, N, K] by least squares; `iterations` 0 leaves the best of the ranges."""
    max_code, in_features = (1 << bits) - 1, w_ENK.shape[-1]
    x = w_ENK.float().unflatten(-1, (-1, group_size))
    bad = ~torch.isfinite(x).all(-1, keepdim=True)
    x = x.masked_fill(bad, 0.0)
    scale, offset = _start(x, max_code)
    n, x_sum = float(group_size), _lane_sum(x)
    for _ in range(iterations):
        q = _codes(x, scale, offset, max_code)
        q_sum, qq_sum, qx_sum = q.sum(-1, keepdim=True), (q * q).sum(-1, keepdim=True), _lane_sum(q * x)
        variance, covariance = qq_sum - q_sum * q_sum / n, qx_sum - q_sum * x_sum / n
        fitted = covariance / variance.masked_fill(variance == 0, 1.0)
        moves = (variance > 0) & (covariance > 0)
        scale = torch.where(moves, fitted, scale)
        offset = torch.where(moves, (x_sum - fitted * q_sum) / n, offset)
    scale, offset = scale.half() + 0.0, offset.half() + 0.0  # no negative zeros
    bad |= ~(torch.isfinite(scale) & torch.isfinite(offset))
    q = _codes(x, scale.float(), offset.float(), max_code).masked_fill(bad, 0.0)
    scale, offset = scale.masked_fill(bad, torch.nan).squeeze(-1), offset.masked_fill(bad, torch.nan).squeeze(-1)
    return QuantizedMatrix(pack(q.flatten(-2).to(torch.uint8), bits), scale, offset, bits, group_size, in_features)


def dequantize(matrix: QuantizedMatrix) -> torch.Tensor:
    """Return float32 [E, N, K]; the product of code and scale is exact, so one rounding a weight."""
    codes = unpack(matrix.codes, matrix.bits, matrix.in_features).float().unflatten(-1, (-1, matrix.group_size))
    return (codes * matrix.scales.float()[..., None] + matrix.offsets.float()[..., None]).flatten(-2)


def quantize_factor(x_RL: torch.Tensor, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows of a factor, float32 [R, L], to codes uint8 [R, blocks * 32] and scales float16 [R, blocks].

    Per block: q = clamp(rint(x / s) + 8, 0, 15), s = sum x (q - 8) / sum (q - 8)^2 in turn, from s = max |x| / 7.5.
    A block with a value that is not finite, or beyond float16, gets codes of 8 and NaN for its scale.
    """
    length = x_RL.shape[-1]
    x = torch.nn.functional.pad(x_RL.float(), (0, num_blocks(length) * BLOCK - length)).unflatten(-1, (-1, BLOCK))
    bad = ~torch.isfinite(x).all(-1, keepdim=True)
    x = x.masked_fill(bad, 0.0)
    scale = x.abs().amax(-1, keepdim=True) / 7.5
    for _ in range(iterations):
        q = _factor_codes(x, scale)
        qq_sum, qx_sum = (q * q).sum(-1, keepdim=True), _lane_sum(q * x)
        scale = torch.where((qq_sum > 0) & (qx_sum > 0), qx_sum / qq_sum.clamp(min=1.0), scale)
    scale = scale.half()
    bad |= ~torch.isfinite(scale)
    q = _factor_codes(x, scale.float()).masked_fill(bad, 0.0) + FACTOR_ZERO
    codes = pack(q.flatten(-2)[..., :length].to(torch.uint8), FACTOR_BITS)
    return codes, scale.masked_fill(bad, torch.nan).squeeze(-1)


def dequantize_factor(codes: torch.Tensor, scales: torch.Tensor, length: int) -> torch.Tensor:
    """Return float32 [R, length]; no rounding."""
    values = unpack(codes, FACTOR_BITS, num_blocks(length) * BLOCK).float() - FACTOR_ZERO
    return (values.unflatten(-1, (-1, BLOCK)) * scales.float()[..., None]).flatten(-2)[..., :length]


def linear(x_TK: torch.Tensor, matrix: QuantizedMatrix, factors: Factors | None, expert: int) -> torch.Tensor:
    """Return W^ x + U^ (V^ x) of one of the matrices, float32 [T, N]."""
    one = QuantizedMatrix(
        *(x[expert : expert + 1] for x in (matrix.codes, matrix.scales, matrix.offsets)),
        matrix.bits, matrix.group_size, matrix.in_features,
    )  # fmt: skip
    x_TK = x_TK.float()
    y_TN = _dot(x_TK, dequantize(one)[0])
    if factors is not None:
        start, end = factors.starts[expert : expert + 2].tolist()
        v_RK = dequantize_factor(factors.v_codes[start:end], factors.v_scales[start:end], matrix.in_features)
        u_RN = dequantize_factor(factors.u_codes[start:end], factors.u_scales[start:end], matrix.out_features)
        t_TR = _dot(x_TK, v_RK)
        for rank in range(end - start):
            y_TN = fma(t_TR[:, rank, None].expand_as(y_TN), u_RN[rank].expand_as(y_TN), y_TN)
    return y_TN


def experts(
    x_TK: torch.Tensor, weights_TS: torch.Tensor, ids_TS: torch.Tensor, w13: QuantizedMatrix,
    w13_factors: Factors | None, w2: QuantizedMatrix, w2_factors: Factors | None,
) -> torch.Tensor:  # fmt: skip
    """Return the sum of the experts of each token times their weights, in the order of `ids_TS`; as `api.experts`."""
    out = torch.zeros(x_TK.shape[0], w2.out_features, dtype=torch.float32)
    for token in range(x_TK.shape[0]):
        for slot, expert in enumerate(ids_TS[token].tolist()):
            if expert < 0:
                continue
            gate, up = linear(x_TK[token : token + 1], w13, w13_factors, expert).chunk(2, -1)
            y = linear(silu(gate) * up, w2, w2_factors, expert)[0]
            out[token] = out[token] + weights_TS[token, slot].float() * y
    return out.to(x_TK.dtype)


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Return a * b + c of float32 with one rounding.

    The product is exact in float64. The sum is rounded there to odd (its last bit tells whether anything was lost), so
    that rounding it again to float32 is right.
    """
    product, c = a.double() * b.double(), c.double()
    total = product + c
    part = total - product
    lost = (product - (total - part)) + (c - part)
    bits = total.view(torch.int64)
    even, grows = (bits & 1) == 0, (lost > 0) == (total > 0)
    odd = torch.where((lost != 0) & even & torch.isfinite(total), bits + torch.where(grows, 1, -1), bits)
    return odd.view(torch.float64).float()


def _dot(x_TK: torch.Tensor, w_NK: torch.Tensor) -> torch.Tensor:
    """Return float32 [T, N] of 8 lanes along K."""
    pad = -x_TK.shape[-1] % LANES
    x, w = (torch.nn.functional.pad(a, (0, pad)).unflatten(-1, (-1, LANES)) for a in (x_TK, w_NK))
    shape = (len(x_TK), len(w_NK), LANES)
    lanes = torch.zeros(shape, dtype=torch.float32)
    for i in range(x.shape[-2]):
        lanes = fma(x[:, None, i].expand(shape).contiguous(), w[None, :, i].expand(shape).contiguous(), lanes)
    return _pairwise(lanes)


def _start(x: torch.Tensor, max_code: int) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    middle, half = (low + high) * 0.5, (high - low) * 0.5
    best = torch.full_like(low, torch.inf)
    best_scale, best_offset = torch.zeros_like(low), low
    for part in RANGES:
        reach = half * torch.tensor(part, dtype=torch.float32)
        scale, offset = (reach + reach) / max_code, middle - reach
        difference = x - (_codes(x, scale, offset, max_code) * scale + offset)
        error = _lane_sum(difference * difference)
        better = error < best
        best = torch.where(better, error, best)
        best_scale, best_offset = torch.where(better, scale, best_scale), torch.where(better, offset, best_offset)
    return best_scale, best_offset


def _codes(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, max_code: int) -> torch.Tensor:
    """A group of equal weights has a scale of 0, and codes of 0."""
    inverse = torch.where(scale > 0, scale, torch.ones_like(scale)).reciprocal() * (scale > 0)
    return torch.round((x - offset) * inverse).nan_to_num(0.0).clamp(0, max_code)


def _factor_codes(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    inverse = torch.where(scale > 0, scale, torch.ones_like(scale)).reciprocal() * (scale > 0)
    return torch.round(x * inverse).nan_to_num(0.0).clamp(-FACTOR_ZERO, MAX_FACTOR_CODE - FACTOR_ZERO)


def _lane_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum [..., n] in 8 lanes, then pairwise: [..., 1]."""
    parts = x.unflatten(-1, (-1, LANES))
    lanes = parts[..., 0, :]
    for i in range(1, parts.shape[-2]):
        lanes = lanes + parts[..., i, :]
    return _pairwise(lanes)[..., None]


def _pairwise(lanes: torch.Tensor) -> torch.Tensor:
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]
