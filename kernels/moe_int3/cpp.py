"""Quantized expert layers on the CPU in C++: the signatures of `reference.py`, tensors in, the same bits out. Threads
are `torch.get_num_threads()`, those of torch. Costs: README.md."""

from __future__ import annotations

import torch  # before the module: its OpenMP runtime is the one to use

from rl_accel.errors import MoEError
from rl_accel.kernels.moe_int3 import _moe_int3
from rl_accel.kernels.moe_int3.layout import FACTOR_BITS, LANES, Factors, QuantizedMatrix, num_blocks


def set_instructions(name: str) -> None:
    """Take an instruction set: scalar, avx2, avx512, or auto, the widest of this CPU. For tests.

    Raises:
        ValueError: for one that this CPU lacks.
    """
    _moe_int3.set_instructions(name)


def instructions() -> str:
    """Return the name of the instruction set in use."""
    return _moe_int3.instructions()


def quantize(w_ENK: torch.Tensor, bits: int, group_size: int, iterations: int) -> QuantizedMatrix:
    w_ENK = w_ENK.float().contiguous()
    *rows, length = w_ENK.shape
    codes = torch.empty(*rows, num_blocks(length) * LANES * bits, dtype=torch.uint8)
    scales, offsets = (torch.empty(*rows, length // group_size, dtype=torch.float16) for _ in range(2))
    _moe_int3.quantize(
        w_ENK.data_ptr(), rows[0] * rows[1], bits, group_size, length, iterations, codes.data_ptr(), scales.data_ptr(),
        offsets.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return QuantizedMatrix(codes, scales, offsets, bits, group_size, length)


def dequantize(matrix: QuantizedMatrix) -> torch.Tensor:
    w_ENK = torch.empty(matrix.num_matrices, matrix.out_features, matrix.in_features, dtype=torch.float32)
    rows = matrix.num_matrices * matrix.out_features
    _moe_int3.dequantize(_matrix(matrix), rows, w_ENK.data_ptr(), torch.get_num_threads())
    return w_ENK


def quantize_factor(x_RL: torch.Tensor, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    x_RL = x_RL.float().contiguous()
    rows, length = x_RL.shape
    codes = torch.empty(rows, num_blocks(length) * LANES * FACTOR_BITS, dtype=torch.uint8)
    scales = torch.empty(rows, num_blocks(length), dtype=torch.float16)
    _moe_int3.quantize_factor(
        x_RL.data_ptr(), rows, length, iterations, codes.data_ptr(), scales.data_ptr(), torch.get_num_threads()
    )
    return codes, scales


def dequantize_factor(codes: torch.Tensor, scales: torch.Tensor, length: int) -> torch.Tensor:
    codes, scales = codes.contiguous(), scales.contiguous()
    x_RL = torch.empty(len(codes), length, dtype=torch.float32)
    _moe_int3.dequantize_factor(
        codes.data_ptr(), scales.data_ptr(), len(codes), length, x_RL.data_ptr(), torch.get_num_threads()
    )
    return x_RL


def linear(x_TK: torch.Tensor, matrix: QuantizedMatrix, factors: Factors | None, expert: int) -> torch.Tensor:
    x_TK = x_TK.float().contiguous()
    y_TN = torch.empty(len(x_TK), matrix.out_features, dtype=torch.float32)
    _moe_int3.linear(
        x_TK.data_ptr(), len(x_TK), _matrix(matrix), _factors(factors), expert, y_TN.data_ptr(), torch.get_num_threads()
    )
    return y_TN


def experts(
    x_TK: torch.Tensor, weights_TS: torch.Tensor, ids_TS: torch.Tensor, w13: QuantizedMatrix,
    w13_factors: Factors | None, w2: QuantizedMatrix, w2_factors: Factors | None,
) -> torch.Tensor:  # fmt: skip
    x, weights, ids = x_TK.float().contiguous(), weights_TS.float().contiguous(), ids_TS.contiguous()
    out = torch.empty(len(x), w2.out_features, dtype=torch.float32)
    if not _moe_int3.experts(
        x.data_ptr(), len(x), weights.data_ptr(), ids.data_ptr(), ids.shape[1], w13.num_matrices, _matrix(w13),
        _factors(w13_factors), _matrix(w2), _factors(w2_factors), out.data_ptr(), torch.get_num_threads(),
    ):  # fmt: skip
        raise MoEError(f"experts must be numbered below {w13.num_matrices}; got {int(ids.max())}")
    return out.to(x_TK.dtype)


def _matrix(matrix: QuantizedMatrix) -> _moe_int3.Matrix:
    return _moe_int3.Matrix(
        matrix.codes.data_ptr(), matrix.scales.data_ptr(), matrix.offsets.data_ptr(), matrix.bits, matrix.group_size,
        matrix.in_features, matrix.out_features,
    )  # fmt: skip


def _factors(factors: Factors | None) -> _moe_int3.Factors:
    """All addresses 0: there are none."""
    if factors is None or not len(factors.v_codes):
        return _moe_int3.Factors(0, 0, 0, 0, 0)
    tensors = (factors.v_codes, factors.v_scales, factors.u_codes, factors.u_scales, factors.starts)
    return _moe_int3.Factors(*(x.data_ptr() for x in tensors))
