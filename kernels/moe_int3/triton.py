"""Triton backend of quantized experts: `reference.py` on CUDA, and on CPU under `TRITON_INTERPRET=1`.

Quantizers give the bits of the specification. Layers give its values up to the rounding of the dtype of x: activations
between the two GEMMs, and the products t of compensators with a token, are rounded to it. Nothing is read back by the
host and no grid depends on which experts tokens go to, so a CUDA graph can capture a layer, provided that its matrices
come as `PlaneMatrix` (`to_planes`); a `QuantizedMatrix` is rearranged in every call.

Kernels and cost: `triton_quantize.py`, `triton_planes.py`, `triton_experts.py`, TRITON.md.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton

from rl_accel.errors import MoEError
from rl_accel.kernels.moe_int3.layout import FACTOR_BITS, LANES, Factors, QuantizedMatrix, num_blocks
from rl_accel.kernels.moe_int3.triton_experts import (
    align_kernel,
    gemm_kernel,
    group_sums_kernel,
    reduce_kernel,
    silu_kernel,
)
from rl_accel.kernels.moe_int3.triton_planes import PlaneMatrix, to_planes
from rl_accel.kernels.moe_int3.triton_quantize import (
    RUNS,
    dequantize_kernel,
    quantize_factor_kernel,
    quantize_kernel,
)

_EXACT = {"num_warps": 4, "enable_fp_fusion": False}
ALIGN_TILE, REDUCE_TILE, SUM_TILE = 1024, 1024, 8
STAGES = 3
"""Groups that are fetched ahead, and one."""
ENOUGH_PROGRAMS = 264
"""Two for each multiprocessor of an H100 or H200; with as many, a program takes 128 rows and not 64."""
MAX_RANK = 128
"""Ranks of an expert whose products t a program still holds in registers."""


def quantize(w_ENK: torch.Tensor, bits: int, group_size: int, iterations: int) -> QuantizedMatrix:
    """Quantize float32 [E, N, K]; as `reference.quantize`."""
    num_matrices, rows, length = w_ENK.shape
    blocks, device = num_blocks(length), w_ENK.device
    codes = torch.empty(num_matrices, rows, blocks * LANES * bits, dtype=torch.uint8, device=device)
    scales, offsets = torch.empty(
        2, num_matrices, rows, length // group_size, dtype=torch.float16, device=device
    ).unbind()
    runs = num_matrices * rows * blocks
    if runs:
        with _device(w_ENK):
            quantize_kernel[(triton.cdiv(runs, RUNS),)](
                codes, scales, offsets, w_ENK, num_matrices * rows, length, blocks, iterations,
                BITS=bits, GROUP=group_size, RUNS=RUNS, **_EXACT,
            )  # fmt: skip
    return QuantizedMatrix(codes, scales, offsets, bits, group_size, length)


def quantize_factor(x_RL: torch.Tensor, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows of a factor, float32 [R, L]; as `reference.quantize_factor`."""
    rows, length = x_RL.shape
    blocks = num_blocks(length)
    codes = torch.empty(rows, blocks * LANES * FACTOR_BITS, dtype=torch.uint8, device=x_RL.device)
    scales = torch.empty(rows, blocks, dtype=torch.float16, device=x_RL.device)
    if rows and blocks:
        with _device(x_RL):
            quantize_factor_kernel[(triton.cdiv(rows * blocks, RUNS),)](
                codes, scales, x_RL.contiguous(), rows, length, blocks, iterations, RUNS=RUNS, **_EXACT
            )
    return codes, scales


def dequantize(matrix: QuantizedMatrix) -> torch.Tensor:
    """Return float32 [E, N, K]; as `reference.dequantize`."""
    num_matrices, rows = matrix.codes.shape[:2]
    blocks = num_blocks(matrix.in_features)
    out = torch.empty(num_matrices, rows, matrix.in_features, dtype=torch.float32, device=matrix.codes.device)
    runs = num_matrices * rows * blocks
    if runs:
        with _device(out):
            dequantize_kernel[(triton.cdiv(runs, RUNS),)](
                out, matrix.codes, matrix.scales, matrix.offsets, num_matrices * rows, matrix.in_features, blocks,
                BITS=matrix.bits, GROUP=matrix.group_size, RUNS=RUNS, **_EXACT,
            )  # fmt: skip
    return out


def align(ids_P: torch.Tensor, num_experts: int, block_m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort pairs of token and slot by expert, in blocks that belong to one.

    Args:
        ids_P: int32, negative: none.

    Returns:
        int32 [blocks, block_m] numbers of pairs in their order, -1 where a block is not full; int32 [blocks] experts,
        -1 for blocks that stay empty. The number of blocks is the most that any ids take.
    """
    num_pairs, device = ids_P.numel(), ids_P.device
    count = num_pairs // block_m + min(num_pairs, num_experts)
    pairs = torch.empty(count, block_m, dtype=torch.int32, device=device)
    experts_B = torch.empty(count, dtype=torch.int32, device=device)
    with _device(ids_P):
        align_kernel[(num_experts + 1,)](
            pairs, experts_B, ids_P, num_pairs, count,
            E=num_experts, EP=triton.next_power_of_2(num_experts + 1), BLOCK_M=block_m, TILE=ALIGN_TILE, num_warps=4,
        )  # fmt: skip
    return pairs, experts_B


def block_m(num_pairs: int, num_experts: int) -> int:
    """Tokens of a program, by the mean that an expert has: no more columns than it fills, and no fewer than an MMA."""
    mean = num_pairs / max(1, min(num_experts, num_pairs))
    return 16 if mean <= 16 else 32 if mean <= 32 else 64


def num_tiles(rows: int, num_blocks: int, block_m: int) -> int:
    """Tiles of 64 rows that share a program's tokens, as far as registers and the number of programs allow."""
    return 2 if block_m <= 32 and triton.cdiv(rows, 128) * num_blocks >= ENOUGH_PROGRAMS else 1


def linear(
    x_TK: torch.Tensor, matrix: QuantizedMatrix | PlaneMatrix, factors: Factors | None, expert: int
) -> torch.Tensor:
    """Return W^ x + U^ (V^ x) of one of the matrices, float32 [T, N]; `factors` are those of a `QuantizedMatrix`."""
    planes = _planes(matrix, factors)
    num_tokens, size = len(x_TK), block_m(len(x_TK), 1)
    out = torch.empty(num_tokens, planes.out_features, dtype=torch.float32, device=x_TK.device)
    if not num_tokens:
        return out
    count = triton.cdiv(num_tokens, size)
    pairs = torch.arange(count * size, dtype=torch.int32, device=x_TK.device)
    pairs = pairs.masked_fill_(pairs >= num_tokens, -1).view(count, size)
    experts_B = torch.full((count,), expert, dtype=torch.int32, device=x_TK.device)
    with _device(x_TK):
        _gemm(out, x_TK, _group_sums(x_TK, planes.group_size), pairs, experts_B, None, planes, 1)
    return out


def experts(
    x_TK: torch.Tensor, weights_TS: torch.Tensor, ids_TS: torch.Tensor, w13: QuantizedMatrix | PlaneMatrix,
    w13_factors: Factors | None, w2: QuantizedMatrix | PlaneMatrix, w2_factors: Factors | None,
) -> torch.Tensor:  # fmt: skip
    """Return the sum of the experts of each token times their weights; as `api.experts`."""
    w13, w2 = _planes(w13, w13_factors), _planes(w2, w2_factors)
    (num_tokens, slots), device, dtype = ids_TS.shape, x_TK.device, x_TK.dtype
    out = torch.empty(num_tokens, w2.out_features, dtype=dtype, device=device)
    if not ids_TS.numel():
        return out.zero_()
    ids, weights = ids_TS.int().contiguous(), weights_TS.float().contiguous()
    num_pairs, inner = ids.numel(), w2.in_features
    gate_up = torch.empty(num_pairs, 2 * inner, dtype=dtype, device=device)
    hidden = torch.empty(num_pairs, inner, dtype=dtype, device=device)
    y = torch.empty(num_pairs, w2.out_features, dtype=dtype, device=device)
    groups = inner // w2.group_size
    sums = torch.empty(num_pairs, groups, dtype=torch.float32, device=device)
    with _device(x_TK):
        pairs, experts_B = align(ids, w13.num_matrices, block_m(num_pairs, w13.num_matrices))
        _gemm(gate_up, x_TK, _group_sums(x_TK, w13.group_size), pairs, experts_B, None, w13, slots)
        silu_kernel[(num_pairs, triton.cdiv(groups, SUM_TILE))](
            hidden, sums, gate_up, ids, groups, GROUP=w2.group_size, TILE=SUM_TILE, num_warps=1
        )
        _gemm(y, hidden, sums, pairs, experts_B, weights, w2, 1)
        reduce_kernel[(num_tokens, triton.cdiv(w2.out_features, REDUCE_TILE))](
            out, y, ids, w2.out_features, S=slots, TILE=REDUCE_TILE, num_warps=4
        )
    return out


def _planes(matrix: QuantizedMatrix | PlaneMatrix, factors: Factors | None) -> PlaneMatrix:
    return matrix if isinstance(matrix, PlaneMatrix) else to_planes(matrix, factors)


def _group_sums(x_TK: torch.Tensor, group_size: int) -> torch.Tensor:
    groups = x_TK.shape[1] // group_size
    sums = torch.empty(len(x_TK), groups, dtype=torch.float32, device=x_TK.device)
    group_sums_kernel[(len(x_TK), triton.cdiv(groups, SUM_TILE))](
        sums, x_TK, x_TK.stride(0), groups, GROUP=group_size, TILE=SUM_TILE, num_warps=1
    )
    return sums


def _gemm(
    out: torch.Tensor, x: torch.Tensor, sums: torch.Tensor, pairs: torch.Tensor, experts_B: torch.Tensor,
    weights: torch.Tensor | None, planes: PlaneMatrix, shared: int,
) -> None:  # fmt: skip
    if x.shape[1] != planes.in_features or x.stride(1) != 1:
        raise MoEError(f"x must have rows of {planes.in_features} neighbors; got {list(x.shape)}, {x.stride()}")
    factors, rank = planes.factors, 0
    if factors is not None:
        rank = max(16, triton.next_power_of_2(factors.max_rank))
        if rank > MAX_RANK:
            raise MoEError(f"compensators have ranks of at most {MAX_RANK} on GPUs; got {factors.max_rank}")
    rows, blocks = planes.out_features, planes.low.shape[1]
    tiles = num_tiles(rows, *pairs.shape)
    gemm_kernel[(triton.cdiv(rows, 64 * tiles), len(experts_B))](
        out, x, sums, pairs, experts_B, weights, planes.low, planes.high, planes.affine,
        *((None,) * 5 if factors is None else
          (factors.starts, factors.v, factors.v_scales, factors.u, factors.u_scales)),
        rows, sums.shape[1], blocks, 0 if factors is None else factors.v.shape[1], x.stride(0),
        SHARED=shared, BITS=planes.bits, GROUP=planes.group_size, RANK=rank, BLOCK_M=pairs.shape[1], TILES=tiles,
        STAGES=STAGES, num_warps=4,
    )  # fmt: skip


def _device(x: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which may not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
