"""Quantized matrices as the Triton kernels of expert layers read them, and the kernels that arrange them so.

The layout of `layout.py` has a row's blocks of 64 codes behind each other and, with 3 bits, lanes of 3 bytes, which
straddle words. A GEMM reads a block of 64 rows at a time and wants two neighbors along K as the halves of a register.
So blocks come first and rows second, a tile being one run of bytes, and codes lie in words of

    2 bits    16 neighbors: pair p, codes 2 p and 2 p + 1, at bits 2 p and 16 + 2 p
    4 bits     8 neighbors: pair p at bits 4 p and 16 + 4 p
    3 bits    the lower two bits as with 2 bits, and a plane of words of 16 bits: bit 2 of pair p at bits p and 8 + p

One shift and one mask then give a pair, and no byte is wasted. Scale and offset of a group share a word. Factors have
words of 4 bits; their scales become float32, so that asynchronous copies, of 4 bytes or more, can fetch them.

Cost: a read and a write of the packed bytes, once after loading or refreshing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl

from rl_accel.kernels.moe_int3.layout import FACTOR_BITS, Factors, QuantizedMatrix, num_blocks
from rl_accel.kernels.moe_int3.triton_quantize import load_lane

RUNS = 64
"""Blocks of a program."""


@dataclass(frozen=True)
class PlaneFactors:
    """Compensators of E matrices, blocks first."""

    v: torch.Tensor
    """int32 [blocks of K, R, 8]."""
    v_scales: torch.Tensor
    """float32 [blocks of K, R]."""
    u: torch.Tensor
    """int32 [blocks of N, R, 8]."""
    u_scales: torch.Tensor
    """float32 [blocks of N, R]."""
    starts: torch.Tensor
    """int32 [E + 1]."""
    max_rank: int


@dataclass(frozen=True)
class PlaneMatrix:
    """A batch of E quantized matrices [N, K], blocks first, with their compensators."""

    low: torch.Tensor
    """int32 [E, blocks, N, 4]; [E, blocks, N, 8] with 4 bits."""
    high: torch.Tensor | None
    """int16 [E, blocks, N, 4] with 3 bits."""
    affine: torch.Tensor
    """int32 [E, K / group_size, N]: bits of the float16 scale, and above them those of the offset."""
    bits: int
    group_size: int
    in_features: int
    factors: PlaneFactors | None = None

    @property
    def num_matrices(self) -> int:
        return self.low.shape[0]

    @property
    def out_features(self) -> int:
        return self.low.shape[2]

    def memory_bytes(self) -> int:
        held = [
            getattr(part, field.name) for part in (self, self.factors) if part is not None for field in fields(part)
        ]
        return sum(x.nbytes for x in held if isinstance(x, torch.Tensor))


@triton.jit
def planes_kernel(
    low_ptr,
    high_ptr,
    codes_ptr,  # uint8 [E, N, blocks * 8 * BITS]
    runs,
    rows,  # N
    blocks,
    BITS: tl.constexpr,
    RUNS: tl.constexpr,
):
    CODES: tl.constexpr = 8 if BITS == 4 else 16
    WORDS: tl.constexpr = 64 // CODES
    WIDTH: tl.constexpr = 4 if BITS == 4 else 2
    run = (tl.program_id(0).to(tl.int64) * RUNS + tl.arange(0, RUNS))[:, None]  # of [E, blocks, N]
    live = run < runs
    row, block, matrix = run % rows, run // rows % blocks, run // rows // blocks
    first = ((matrix * rows + row) * blocks + block) * (8 * BITS)
    word = tl.arange(0, WORDS)[None, :]
    low = tl.zeros((RUNS, WORDS), dtype=tl.int32)
    high = tl.zeros((RUNS, WORDS), dtype=tl.int32)
    for lane in tl.static_range(8):
        codes = load_lane(codes_ptr + first + lane * BITS, live, BITS)
        for part in tl.static_range(CODES // 8):
            code = (codes >> ((word * (CODES // 8) + part) * BITS)) & ((1 << BITS) - 1)
            pair = part * 4 + lane // 2
            low |= (code & ((1 << WIDTH) - 1)) << (pair * WIDTH + lane % 2 * 16)
            if BITS == 3:
                high |= (code >> 2) << (pair + lane % 2 * 8)
    tl.store(low_ptr + run * WORDS + word, low, mask=live)
    if BITS == 3:
        tl.store(high_ptr + run * WORDS + word, high.to(tl.int16), mask=live)


def to_planes(matrix: QuantizedMatrix, factors: Factors | None = None) -> PlaneMatrix:
    """Arrange quantized matrices and their compensators for the GEMM.

    Reads the largest rank on the host, so a CUDA stream is waited for; call it after loading or refreshing weights.
    """
    low, high = _code_planes(matrix.codes, matrix.bits, num_blocks(matrix.in_features))
    affine = torch.stack([matrix.scales, matrix.offsets], -1).view(torch.int32).squeeze(-1)
    return PlaneMatrix(
        low, high, affine.transpose(1, 2).contiguous(), matrix.bits, matrix.group_size, matrix.in_features,
        None if factors is None else _factor_planes(factors),
    )  # fmt: skip


def _code_planes(codes: torch.Tensor, bits: int, blocks: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    num_matrices, rows = codes.shape[:2]
    shape = (num_matrices, blocks, rows, 8 if bits == 4 else 4)
    low = torch.empty(shape, dtype=torch.int32, device=codes.device)
    high = torch.empty(shape, dtype=torch.int16, device=codes.device) if bits == 3 else None
    runs = num_matrices * blocks * rows
    if runs:
        with torch.cuda.device_of(codes):
            planes_kernel[(triton.cdiv(runs, RUNS),)](
                low, high, codes, runs, rows, blocks, BITS=bits, RUNS=RUNS, num_warps=4
            )
    return low, high


def _factor_planes(factors: Factors) -> PlaneFactors | None:
    max_rank = int(factors.starts.diff().max())
    if not max_rank:
        return None
    v, u = (
        _code_planes(codes[None], FACTOR_BITS, scales.shape[1])[0][0]
        for codes, scales in ((factors.v_codes, factors.v_scales), (factors.u_codes, factors.u_scales))
    )
    v_scales, u_scales = (scales.float().t().contiguous() for scales in (factors.v_scales, factors.u_scales))
    return PlaneFactors(v, v_scales, u, u_scales, factors.starts, max_rank)
