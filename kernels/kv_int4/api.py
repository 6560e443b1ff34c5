"""Quantized KV cache: store, and attention over pages, with three backends.

`auto` takes Triton for CUDA tensors and C++ for the CPU; `torch` is the specification (`reference.py`), whose bits C++
has. Pages are described in `layout.py`. Left out: what `reference.py` leaves out. Costs: `kernels/kv_int4/README.md`.

Shape suffixes: N tokens, K KV heads, H query heads, C head size, S requests, M blocks of a request at most.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from rl_accel.errors import KVCacheError, NotLiveError
from rl_accel.kernels.kv_int4.layout import PageLayout

BACKENDS = ("auto", "torch", "cpp", "triton")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def load_backend(name: str, device: torch.device | str = "cpu") -> ModuleType:
    """Return the module that holds `store` and `attend_batch` for a backend and a device.

    Raises:
        KVCacheError: for an unknown name, or one that cannot serve the device.
        NotLiveError: if the backend is not built or installed here.
    """
    kind = torch.device(device).type
    if name == "auto":
        name = "triton" if kind == "cuda" else "cpp" if kind == "cpu" else "torch"
    if name not in BACKENDS:
        raise KVCacheError(f"backend {name!r} of the KV cache is unknown; known: {', '.join(BACKENDS)}")
    if name == "cpp" and kind != "cpu":
        raise KVCacheError(f"backend cpp of the KV cache serves CPU tensors; got a tensor on {kind}")
    try:
        return importlib.import_module(f"rl_accel.kernels.kv_int4.{'reference' if name == 'torch' else name}")
    except ImportError as error:
        raise NotLiveError(f"backend {name} of the KV cache does not load: {error}") from error


def store(
    pages: torch.Tensor,
    layout: PageLayout,
    slots_N: torch.Tensor,
    k_NKC: torch.Tensor,
    v_NKC: torch.Tensor,
    order: int = 16,
    shift_KC: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> None:
    """Write K and V of tokens to their slots; the rest of a page stays.

    Args:
        pages: uint8 [blocks, K, layout.page_bytes], contiguous, aligned to 64 bytes.
        slots_N: int64, block * block_size + position in it; negative: nothing is stored.
        k_NKC, v_NKC: float32, bfloat16 or float16; a token's [K, C] contiguous, tokens at any stride; before rotation.
        order: of the rotation of K, a power of two that divides C; 1: none.
        shift_KC: float32, contiguous; subtracted from every K before rotation.

    Raises:
        KVCacheError: for a wrong shape, dtype, device or order.
    """
    num_heads = _check_pages(pages, layout)
    check_order(order, layout.head_size)
    for name, x in (("k", k_NKC), ("v", v_NKC)):
        _check_heads(name, x, (len(slots_N), num_heads, layout.head_size), pages.device)
    if k_NKC.dtype != v_NKC.dtype:
        raise KVCacheError(f"k and v must have one dtype; got {k_NKC.dtype} and {v_NKC.dtype}")
    _check_ints("slots", slots_N, torch.int64, 1, pages.device)
    if shift_KC is not None and (
        shift_KC.shape != (num_heads, layout.head_size)
        or shift_KC.dtype != torch.float32
        or not shift_KC.is_contiguous()
    ):
        raise KVCacheError(f"shift must be contiguous float32 [{num_heads}, {layout.head_size}]")
    load_backend(backend, pages.device).store(pages, layout, slots_N, k_NKC, v_NKC, order, shift_KC)


def attend(
    query_NHC: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    block_table_SM: torch.Tensor,
    query_start_S1: torch.Tensor,
    seq_lens_S: torch.Tensor,
    scale: float,
    order: int = 16,
    *,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Return causal attention of the last tokens of each request over its pages.

    Args:
        query_NHC: float32, bfloat16 or float16, before rotation; a token's [H, C] contiguous, tokens at any stride.
        pages: uint8 [blocks, K, layout.page_bytes]; H is a multiple of K.
        block_table_SM: int32, contiguous in its last dimension.
        query_start_S1: int32; request s has the queries query_start[s] .. query_start[s + 1] - 1, those of its last
            tokens.
        seq_lens_S: int32, tokens of each request, its queries included.
        scale: of the scores.
        order: of the rotation of K in these pages.
        out: [N, H, C] of the dtype of the queries, as these in memory; made if None. Rows that belong to no request
            stay.

    Raises:
        KVCacheError: for a wrong shape, dtype, device or order.
    """
    num_heads = _check_pages(pages, layout)
    check_order(order, layout.head_size)
    if query_NHC.dim() != 3 or query_NHC.shape[1] % num_heads:
        raise KVCacheError(
            f"queries must be [N, H, C], H a multiple of {num_heads} KV heads; got {tuple(query_NHC.shape)}"
        )
    shape = (*query_NHC.shape[:2], layout.head_size)
    _check_heads("query", query_NHC, shape, pages.device)
    if out is None:
        out = torch.empty(shape, dtype=query_NHC.dtype, device=pages.device)
    _check_heads("out", out, shape, pages.device)
    if out.dtype != query_NHC.dtype:
        raise KVCacheError(f"out must be {query_NHC.dtype} as the queries; got {out.dtype}")
    _check_ints("block_table", block_table_SM, torch.int32, 2, pages.device)
    _check_ints("query_start", query_start_S1, torch.int32, 1, pages.device)
    _check_ints("seq_lens", seq_lens_S, torch.int32, 1, pages.device)
    if not len(block_table_SM) == len(seq_lens_S) == len(query_start_S1) - 1:
        raise KVCacheError(
            f"block_table, seq_lens and query_start are of {len(block_table_SM)}, {len(seq_lens_S)} and "
            f"{len(query_start_S1) - 1} requests"
        )
    load_backend(backend, pages.device).attend_batch(
        out, query_NHC, pages, layout, block_table_SM, query_start_S1, seq_lens_S, scale, order
    )
    return out


def check_order(order: int, head_size: int) -> None:
    """Raise KVCacheError unless K of this head size can be rotated in blocks of `order`."""
    if order < 1 or order & (order - 1) or head_size % order:
        raise KVCacheError(f"order must be a power of two that divides the head size {head_size}; got {order}")


def _check_pages(pages: torch.Tensor, layout: PageLayout) -> int:
    """Return the number of KV heads."""
    if pages.dtype != torch.uint8 or pages.dim() != 3 or pages.shape[2] != layout.page_bytes:
        raise KVCacheError(
            f"pages must be uint8 [blocks, KV heads, {layout.page_bytes}]; got {pages.dtype} {tuple(pages.shape)}"
        )
    if not pages.is_contiguous() or pages.data_ptr() % 64:
        raise KVCacheError("pages must be contiguous and start at a multiple of 64 bytes")
    return pages.shape[1]


def _check_heads(name: str, x: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if x.dtype not in FLOATS or x.shape != shape or x.device != device:
        raise KVCacheError(
            f"{name} must be float32, bfloat16 or float16 {list(shape)} on {device}; got {x.dtype} {list(x.shape)} on "
            f"{x.device}"
        )
    if x.stride(2) != 1 or x.stride(1) != shape[2]:
        raise KVCacheError(f"{name}: the heads of a token must be contiguous; got strides {x.stride()}")


def _check_ints(name: str, x: torch.Tensor, dtype: torch.dtype, dim: int, device: torch.device) -> None:
    if x.dtype != dtype or x.dim() != dim or x.device != device or (x.numel() and x.stride(-1) != 1):
        raise KVCacheError(
            f"{name} must be contiguous {dtype} with {dim} dimensions on {device}; got {x.dtype} {tuple(x.shape)} on "
            f"{x.device}"
        )
