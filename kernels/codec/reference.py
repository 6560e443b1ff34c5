"""The codec in plain PyTorch: the specification that the C++ and Triton backends equal bit for bit.

Nothing here depends on a fused multiply-add or on the order in which a vector unit adds, so that every backend can
follow: the largest magnitude of a group is an integer maximum of the floats' bits, all else is one rounding each.
A group that holds a NaN or an infinity gets the scale NaN, so it comes out as NaN and overflow checks see it.
Not covered: speed (20 to 60 times slower than the C++), and the payload of a NaN.
Source: SDP4Bit §3; differs: rounding noise is a counter-based hash instead of a clock-seeded generator, non-finite
values survive, and the packing is by halves of 32.

Shapes: N values, P padded values, G groups, R blocks to sum, B bytes of one block.
"""

from __future__ import annotations

import torch

from rl_accel.kernels.codec.layout import HADAMARD_BLOCK, TINY, max_code, padded
from rl_accel.kernels.codec.rows import Rows
from rl_accel.kernels.common.hadamard import hadamard as transform
from rl_accel.kernels.common.noise import rounding_noise

_INFINITY_BITS = 0x7F800000


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
    """Quantize `x - subtract` (float32), rotated by Hadamard-32 if asked for, into `out`.

    Args:
        out_B: uint8 [packed_bytes(N)], written.
        x_N, subtract_N: float32 or bfloat16.
        key, offset: the noise of value i of the block is a function of (key, offset + i); offset is a multiple of
            `group_size`.
    """
    values_P = torch.zeros(padded(x_N.numel(), group_size), dtype=torch.float32, device=x_N.device)
    values_P[: x_N.numel()] = x_N.float() if subtract_N is None else x_N.float() - subtract_N.float()
    if hadamard:
        values_P = transform(values_P, HADAMARD_BLOCK)
    _encode(out_B, values_P, bits, group_size, stochastic, key, offset)


def dequantize(
    out_N: torch.Tensor, blocks_RB: torch.Tensor, bits: int, group_size: int, hadamard: bool, add: bool
) -> None:
    """Write the sum of R blocks, rotated back if `hadamard`, or add it to `out`.

    Args:
        out_N: float32 or bfloat16, written.
        blocks_RB: uint8 [R, packed_bytes(N)]; summed in order, in float32.
    """
    sum_P = _decode_sum(blocks_RB, padded(out_N.numel(), group_size), bits, group_size)
    if hadamard:
        sum_P = transform(sum_P, HADAMARD_BLOCK) * (1.0 / HADAMARD_BLOCK)
    sum_N = sum_P[: out_N.numel()]
    out_N.copy_(out_N.float() + sum_N if add else sum_N)


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
    """Quantize pieces of `x - subtract` into rows; the noise of position i of all rows is that of (key, offset + i).
    Groups that no piece covers keep what `out` has there.

    Args:
        out_B: uint8 [D * packed_bytes(rows.numel)], written.
    """
    blocks_DB = out_B.view(rows.num_rows, -1)
    for start, count, target, span in rows.pieces_K4.tolist():
        row, first = divmod(target, rows.numel)
        block_B = torch.empty(span * bits // 8 + span // group_size * 4, dtype=torch.uint8, device=x_N.device)
        values_P = torch.zeros(span, dtype=torch.float32, device=x_N.device)
        part = slice(start, start + count)
        values_P[:count] = x_N[part].float() - (0.0 if subtract_N is None else subtract_N[part].float())
        if hadamard:
            values_P = transform(values_P, HADAMARD_BLOCK)
        _encode(block_B, values_P, bits, group_size, stochastic, key, offset + target)
        codes, scales = _ranges(rows, first, span, bits, group_size)
        blocks_DB[row, codes] = block_B[: span * bits // 8]
        blocks_DB[row, scales] = block_B[span * bits // 8 :]


def dequantize_rows(
    out_N: torch.Tensor, blocks_RDB: torch.Tensor, rows: Rows, bits: int, group_size: int, hadamard: bool, add: bool
) -> None:
    """Write the sums of R layers of rows, piece by piece, to where the pieces are in `out`, or add them.

    Args:
        blocks_RDB: uint8 [R, D * packed_bytes(rows.numel)].
    """
    layers_RDB = blocks_RDB.view(blocks_RDB.shape[0], rows.num_rows, -1)
    for start, count, target, span in rows.pieces_K4.tolist():
        row, first = divmod(target, rows.numel)
        codes, scales = _ranges(rows, first, span, bits, group_size)
        piece_RB = torch.cat([layers_RDB[:, row, codes], layers_RDB[:, row, scales]], dim=1)
        # The padding of a piece may be more than its last group.
        padded_P = torch.zeros(span, dtype=torch.float32, device=out_N.device)
        dequantize(padded_P, piece_RB, bits, group_size, hadamard, add=False)
        sum_N, into = padded_P[:count], out_N[start : start + count]
        into.copy_(into.float() + sum_N if add else sum_N)


def _ranges(rows: Rows, first: int, span: int, bits: int, group_size: int) -> tuple[slice, slice]:
    """Where in a row the codes and the scales of `span` values from `first` on are."""
    codes, scales = rows.numel * bits // 8, first // group_size * 4
    return slice(first * bits // 8, (first + span) * bits // 8), slice(
        codes + scales, codes + scales + span // group_size * 4
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
    """Quantize the sum of R blocks anew, without rotating: between the hops of a reduce-scatter.

    Args:
        out_B: uint8 [packed_bytes(numel, bits, group_size)], written.
        blocks_RA: uint8 [R, packed_bytes(numel, from_bits, from_group_size)].
    """
    sum_F = _decode_sum(blocks_RA, padded(numel, from_group_size), from_bits, from_group_size)
    values_P = torch.zeros(padded(numel, group_size), dtype=torch.float32, device=sum_F.device)
    common = min(values_P.numel(), sum_F.numel())
    values_P[:common] = sum_F[:common]
    _encode(out_B, values_P, bits, group_size, stochastic, key, offset)


def _encode(
    out_B: torch.Tensor, values_P: torch.Tensor, bits: int, group_size: int, stochastic: bool, key: int, offset: int
) -> None:
    if not values_P.numel():
        return
    top = max_code(bits)
    values_GS = values_P.view(-1, group_size)
    largest_G = (values_GS.view(torch.int32) & 0x7FFFFFFF).amax(1)
    finite_G = largest_G < _INFINITY_BITS
    largest_G = largest_G.view(torch.float32)
    live_G = finite_G & (largest_G >= TINY)
    scales_G = torch.where(live_G, largest_G * torch.tensor(1.0 / top, dtype=torch.float32), 0.0)
    scales_G = torch.where(finite_G, scales_G, torch.nan)
    inverse_G = torch.where(live_G, top / largest_G, 0.0)
    scaled_GS = values_GS * inverse_G.unsqueeze(1)
    if stochastic:
        scaled_GS = scaled_GS + rounding_noise(key, offset, values_P.numel(), values_P.device).view_as(scaled_GS)
    codes_GS = torch.where(live_G.unsqueeze(1), scaled_GS.round().clamp(-top, top), 0.0).to(torch.int8)
    num_code_bytes = values_P.numel() * bits // 8
    out_B[:num_code_bytes] = _pack(codes_GS, bits)
    out_B[num_code_bytes:] = scales_G.view(torch.uint8)


def _pack(codes_GS: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return codes_GS.reshape(-1).view(torch.uint8)
    halves = codes_GS.reshape(-1, 2, 16).view(torch.uint8)
    return ((halves[:, 0] & 15) | (halves[:, 1] << 4)).view(-1)


def _unpack(codes_C: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return codes_C.view(torch.int8).float()
    pairs = codes_C.view(-1, 16)
    nibbles = torch.stack((pairs & 15, pairs >> 4), dim=1).view(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles).view(-1).float()


def _decode_sum(blocks_RB: torch.Tensor, num_padded: int, bits: int, group_size: int) -> torch.Tensor:
    num_code_bytes = num_padded * bits // 8
    total_P = torch.zeros(num_padded, device=blocks_RB.device)
    if not num_padded:  # the second of several empty blocks starts at byte 1 and cannot be viewed as float32
        return total_P
    for number, block_B in enumerate(blocks_RB):
        codes_P = _unpack(block_B[:num_code_bytes], bits)
        scales_G = block_B[num_code_bytes:].view(torch.float32)
        values_P = (codes_P.view(-1, group_size) * scales_G.unsqueeze(1)).view(-1)
        total_P = values_P if number == 0 else total_P + values_P
    return total_P
