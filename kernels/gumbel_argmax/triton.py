"""Triton kernel that samples one token per row: position-keyed Gumbel noise and argmax in one pass over the
logits.

Same noise as `reference.py`, its specification. The noise never leaves
the registers; each program writes the best score of its slice of a row, [R, S] in all, and PyTorch takes the
best of the S slices. Runs on CUDA, and on CPU under `TRITON_INTERPRET=1`. Maths, cost and bound: README.md
beside this file.
"""

import torch
import triton
import triton.language as tl

from rl_accel.kernels.common.triton import mix64

BLOCK = 2048
"""Logits per tile."""
PROGRAMS = 1024
"""Programs to aim for, several per multiprocessor of a large GPU; few rows are cut into more slices each."""


@triton.jit
def _slice_argmax_kernel(
    logits_ptr,  # [R, V], row stride given, last stride 1
    row_stride,
    keys_ptr,  # [R] int64
    positions_ptr,  # [R] int64
    best_ptr,  # [R, S] float64, out
    token_ptr,  # [R, S] int64, out
    vocab_size,
    slice_size,  # logits per slice, a multiple of BLOCK
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    key = tl.load(keys_ptr + row).to(tl.uint64, bitcast=True)
    position = tl.load(positions_ptr + row).to(tl.uint64, bitcast=True)
    stream = mix64(mix64(key) + position * 0x9E3779B97F4A7C15)

    first = part * slice_size
    last = tl.minimum(first + slice_size, vocab_size)
    best = tl.full((), float("-inf"), tl.float64)
    token = tl.zeros((), tl.int64)
    for start in range(first, last, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + row * row_stride + ids, mask=ids < last, other=float("-inf")).to(tl.float64)
        logits = tl.where(logits == logits, logits, float("-inf"))
        # Noise is at most 36.74, so a tile this far below the best score cannot win, nor can a masked one.
        if tl.max(logits, axis=0) + 36.75 > best:
            bits = mix64(stream + (ids + 1).to(tl.uint64) * 0x9E3779B97F4A7C15)
            uniform = ((bits >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16  # 2^-52
            score, index = tl.max(logits - tl.log(-tl.log(uniform)), axis=0, return_indices=True)
            if score > best:
                best = score
                token = (start + index).to(tl.int64)
    out = row * tl.num_programs(1) + part
    tl.store(best_ptr + out, best)
    tl.store(token_ptr + out, token)


def gumbel_argmax(logits_RV: torch.Tensor, keys_R: torch.Tensor, positions_R: torch.Tensor) -> torch.Tensor:
    """Sample one token per row; arguments, result and errors as `api.gumbel_argmax`,
    which checks them.

    Args:
        logits_RV: [R, V], float32, float16 or bfloat16.
        keys_R: int64 [R].
        positions_R: integer [R].

    Returns:
        int64 [R], token ids.
    """
    num_rows, vocab_size = logits_RV.shape
    if num_rows == 0:
        return torch.empty(0, dtype=torch.int64, device=logits_RV.device)
    if logits_RV.stride(1) != 1:
        logits_RV = logits_RV.contiguous()
    num_tiles = triton.cdiv(vocab_size, BLOCK)
    tiles_per_slice = triton.cdiv(num_tiles, min(num_tiles, triton.cdiv(PROGRAMS, num_rows)))
    num_slices = triton.cdiv(num_tiles, tiles_per_slice)
    best_RS = torch.empty(num_rows, num_slices, dtype=torch.float64, device=logits_RV.device)
    token_RS = torch.empty(num_rows, num_slices, dtype=torch.int64, device=logits_RV.device)
    _slice_argmax_kernel[(num_rows, num_slices)](
        logits_RV,
        logits_RV.stride(0),
        keys_R.contiguous(),
        positions_R.to(torch.int64).contiguous(),
        best_RS,
        token_RS,
        vocab_size,
        tiles_per_slice * BLOCK,
        BLOCK=BLOCK,
    )
    return token_RS.gather(1, best_RS.argmax(dim=1, keepdim=True)).squeeze(1)
