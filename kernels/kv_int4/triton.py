"""Triton backend of the quantized KV cache: pages and rows of `reference.py`, bit for bit.

One launch stores, one attends, and a second one merges where a request's splits of 512 tokens are spread over programs.
Nothing is read back by the host and no grid depends on lengths that only the device knows, so all of it can be captured
in a CUDA graph; programs without work return at once. A tensor in place of the integer `order` lets a captured graph
follow a change. Runs on CUDA on the current stream, and on CPU under `TRITON_INTERPRET=1`.

The GPU needs no other order of bytes than the page of `layout.py`: 16 lanes of a word are 64 bytes in a row, K's words
of 16 tokens one run of 8 C bytes, and the codes of a word go to one thread, as an MMA's operand wants neighbors along
its inner dimension: dims for K, tokens for V.

Left out: what `reference.py` leaves out; tuning per GPU, which nobody has timed. Kernels and cost: `triton_store.py`,
`triton_attend.py`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton

from rl_accel.kernels.kv_int4.layout import PageLayout
from rl_accel.kernels.kv_int4.reference import SPLIT
from rl_accel.kernels.kv_int4.triton_attend import attend_kernel, merge_kernel
from rl_accel.kernels.kv_int4.triton_store import store_kernel

DECODE_M, PREFILL_M = 8, 32
"""Rows of a program: the fewest that an MMA takes as its columns, and the most whose state stays in registers."""
ENOUGH_PROGRAMS = 264
"""Two for each multiprocessor of an H100 or H200. Fewer are multiplied by the splits."""
MAX_WORKSPACE = 1 << 24
"""float32, 64 MiB."""


def store(
    pages: torch.Tensor,
    layout: PageLayout,
    slots_N: torch.Tensor,
    k_NKC: torch.Tensor,
    v_NKC: torch.Tensor,
    order: int | torch.Tensor,
    shift_KC: torch.Tensor | None = None,
) -> None:
    """Write K and V of tokens to their slots; arguments as `api.store`, slots that are not negative all different.

    Args:
        pages: the blocks may lie at any stride that is a multiple of 64 bytes.
        order: also as an int32 tensor [1], read when the kernel runs.
    """
    if not len(slots_N):
        return
    with _device(pages):
        store_kernel[(len(slots_N), pages.shape[1])](
            pages.view(torch.int32),
            slots_N,
            k_NKC,
            v_NKC,
            shift_KC,
            order,
            k_NKC.stride(0),
            v_NKC.stride(0),
            pages.stride(0) // 4,
            ORDER_IN_MEMORY=isinstance(order, torch.Tensor),
            C=layout.head_size,
            CP=max(16, triton.next_power_of_2(layout.head_size)),
            STAGES=_stages(layout.head_size),
            B=layout.block_size,
            BITS=layout.bits,
            PAGE=layout.page_bytes // 4,
            num_warps=1,
            enable_fp_fusion=False,
        )


def num_splits(
    num_tokens: int, num_requests: int, num_heads: int, num_kv_heads: int, head_size: int, max_seq_len: int
) -> int:
    """Return over how many programs the splits of a request are spread; 1: a program goes through all of them."""
    programs = _num_blocks(num_tokens, num_requests, num_heads // num_kv_heads) * num_kv_heads
    splits = triton.cdiv(max_seq_len, SPLIT)
    too_large = splits * num_tokens * num_heads * (head_size + 3) > MAX_WORKSPACE
    return 1 if programs >= ENOUGH_PROGRAMS or too_large or not splits else splits


def workspace_numel(
    num_tokens: int, num_requests: int, num_heads: int, num_kv_heads: int, head_size: int, max_seq_len: int
) -> int:
    """Return how many float32 `attend_batch` needs as a workspace, 0 if none."""
    splits = num_splits(num_tokens, num_requests, num_heads, num_kv_heads, head_size, max_seq_len)
    return splits * num_tokens * num_heads * (head_size + 3) if splits > 1 else 0


def attend_batch(
    out: torch.Tensor,
    query_NHC: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    block_table_SM: torch.Tensor,
    query_start_S1: torch.Tensor,
    seq_lens_S: torch.Tensor,
    scale: float,
    order: int | torch.Tensor,
    *,
    max_seq_len: int | None = None,
    workspace: torch.Tensor | None = None,
) -> None:
    """Write attention of the last tokens of each request to its rows of `out`; arguments as `api.attend`.

    Args:
        pages: as in `store`.
        order: also as an int32 tensor [1], read when the kernels run.
        max_seq_len: an upper bound of `seq_lens`, known on the host; of a captured graph, for all its replays. None: as
            many tokens as the block table has room for.
        workspace: float32, at least `workspace_numel` of them, used until the kernels are done; None: allocated.
    """
    num_tokens, num_heads, _ = query_NHC.shape
    num_requests, num_kv_heads = len(seq_lens_S), pages.shape[1]
    if not num_tokens or not num_requests:
        return
    groups = num_heads // num_kv_heads
    max_seq_len = block_table_SM.shape[1] * layout.block_size if max_seq_len is None else max_seq_len
    splits = num_splits(num_tokens, num_requests, num_heads, num_kv_heads, layout.head_size, max_seq_len)
    needed = workspace_numel(num_tokens, num_requests, num_heads, num_kv_heads, layout.head_size, max_seq_len)
    if workspace is None and needed:
        workspace = torch.empty(needed, dtype=torch.float32, device=pages.device)
    if workspace is not None and workspace.numel() < needed:
        raise ValueError(f"the workspace must have {needed} float32; got {workspace.numel()}")
    parts = workspace if needed else None
    block_m = _block_m(num_tokens, num_requests, groups)
    grid = (_num_blocks(num_tokens, num_requests, groups), num_kv_heads)
    split_grid = (*grid, splits)
    shared = {
        "K": num_kv_heads,
        "G": groups,
        "C": layout.head_size,
        "CP": max(32, triton.next_power_of_2(layout.head_size)),  # an MMA of int8 has an inner dimension of 32
        "BLOCK_M": block_m,
        "num_warps": 4 if block_m < PREFILL_M else 8,
        "enable_fp_fusion": False,
    }
    with _device(pages):
        attend_kernel[split_grid](
            out,
            parts,
            query_NHC,
            pages.view(torch.int32),
            block_table_SM,
            query_start_S1,
            seq_lens_S,
            order,
            scale,
            num_requests,
            num_tokens * num_heads,
            splits,
            out.stride(0),
            query_NHC.stride(0),
            block_table_SM.stride(0),
            pages.stride(0) // 4,
            ORDER_IN_MEMORY=isinstance(order, torch.Tensor),
            STAGES=_stages(layout.head_size),
            B=layout.block_size,
            BITS=layout.bits,
            PAGE=layout.page_bytes // 4,
            **shared,
        )
        if parts is not None:
            merge_kernel[grid](
                out,
                parts,
                query_start_S1,
                seq_lens_S,
                num_requests,
                num_tokens * num_heads,
                splits,
                out.stride(0),
                **shared,
            )


def _block_m(num_tokens: int, num_requests: int, groups: int) -> int:
    """Rows of a program, by what the host knows: a longer tile where requests have more queries than a short one."""
    smallest = max(DECODE_M, triton.next_power_of_2(groups))
    return smallest if num_tokens <= num_requests * (smallest // groups) else max(smallest, PREFILL_M)


def _num_blocks(num_tokens: int, num_requests: int, groups: int) -> int:
    """Blocks of rows, at least as many as the requests need however the tokens are shared out."""
    return num_tokens // (_block_m(num_tokens, num_requests, groups) // groups) + num_requests


def _stages(head_size: int) -> int:
    """Stages of the largest rotation that a head has: log2 of its largest divisor that is a power of two."""
    return (head_size & -head_size).bit_length() - 1


def _device(x: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which may not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
