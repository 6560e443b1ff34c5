"""The codec on the CPU in C++: the signatures of `reference.py`, tensors in. Checks are those of `api.py`; a call costs
about a microsecond beside its work (README.md)."""

from __future__ import annotations

import torch

from rl_accel.kernels.codec import _codec
from rl_accel.kernels.codec.rows import Rows

_BFLOAT16 = torch.bfloat16


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
    _codec.quantize(
        out_B.data_ptr(),
        x_N.numel(),
        x_N.data_ptr(),
        x_N.dtype is _BFLOAT16,
        0 if subtract_N is None else subtract_N.data_ptr(),
        subtract_N is not None and subtract_N.dtype is _BFLOAT16,
        bits,
        group_size,
        stochastic,
        key,
        offset,
        hadamard,
        torch.get_num_threads(),
    )


def dequantize(
    out_N: torch.Tensor, blocks_RB: torch.Tensor, bits: int, group_size: int, hadamard: bool, add: bool
) -> None:
    _codec.dequantize(
        out_N.data_ptr(),
        out_N.dtype is _BFLOAT16,
        out_N.numel(),
        blocks_RB.data_ptr(),
        blocks_RB.shape[0],
        bits,
        group_size,
        hadamard,
        add,
        torch.get_num_threads(),
    )


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
    _codec.quantize_rows(
        out_B.data_ptr(),
        rows.num_rows,
        rows.numel,
        rows.pieces_K4.data_ptr(),
        len(rows.pieces_K4),
        x_N.data_ptr(),
        x_N.dtype is _BFLOAT16,
        0 if subtract_N is None else subtract_N.data_ptr(),
        subtract_N is not None and subtract_N.dtype is _BFLOAT16,
        bits,
        group_size,
        stochastic,
        key,
        offset,
        hadamard,
        torch.get_num_threads(),
    )


def dequantize_rows(
    out_N: torch.Tensor, blocks_RDB: torch.Tensor, rows: Rows, bits: int, group_size: int, hadamard: bool, add: bool
) -> None:
    _codec.dequantize_rows(
        out_N.data_ptr(),
        out_N.dtype is _BFLOAT16,
        rows.num_rows,
        rows.numel,
        rows.pieces_K4.data_ptr(),
        len(rows.pieces_K4),
        blocks_RDB.data_ptr(),
        blocks_RDB.shape[0],
        bits,
        group_size,
        hadamard,
        add,
        torch.get_num_threads(),
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
    _codec.requantize(
        out_B.data_ptr(),
        numel,
        blocks_RA.data_ptr(),
        blocks_RA.shape[0],
        from_bits,
        from_group_size,
        bits,
        group_size,
        stochastic,
        key,
        offset,
        torch.get_num_threads(),
    )
