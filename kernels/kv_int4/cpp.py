"""The quantized KV cache on the CPU in C++: the signatures of `reference.py`, tensors in, the same bits out. Checks are
those of `api.py`, and a head size of at most 512; costs: README.md."""

from __future__ import annotations

import torch  # before the module: its OpenMP runtime is the one to use

from rl_accel.errors import KVCacheError
from rl_accel.kernels.kv_int4 import _kv_int4
from rl_accel.kernels.kv_int4.layout import PageLayout

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def set_instructions(name: str) -> None:
    """Take an instruction set: scalar, avx2, avx512 (with VNNI), or auto, the widest of this CPU. For tests.

    Raises:
        ValueError: for one that this CPU lacks.
    """
    _kv_int4.set_instructions(name)


def instructions() -> str:
    """Return the name of the instruction set in use."""
    return _kv_int4.instructions()


def store(
    pages: torch.Tensor,
    layout: PageLayout,
    slots_N: torch.Tensor,
    k_NKC: torch.Tensor,
    v_NKC: torch.Tensor,
    order: int,
    shift_KC: torch.Tensor | None,
) -> None:
    _check_head_size(layout)
    _kv_int4.store(
        pages.data_ptr(),
        layout.block_size,
        layout.head_size,
        layout.bits,
        pages.shape[1],
        slots_N.data_ptr(),
        slots_N.shape[0],
        k_NKC.data_ptr(),
        k_NKC.stride(0),
        v_NKC.data_ptr(),
        v_NKC.stride(0),
        _DTYPES[k_NKC.dtype],
        0 if shift_KC is None else shift_KC.data_ptr(),
        order,
        torch.get_num_threads(),
    )


def attend_batch(
    out: torch.Tensor,
    query_NHC: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    block_table_SM: torch.Tensor,
    query_start_S1: torch.Tensor,
    seq_lens_S: torch.Tensor,
    scale: float,
    order: int,
) -> None:
    _check_head_size(layout)
    _kv_int4.attend(
        out.data_ptr(),
        out.stride(0),
        query_NHC.data_ptr(),
        query_NHC.stride(0),
        _DTYPES[query_NHC.dtype],
        query_NHC.shape[1],
        pages.shape[1],
        pages.data_ptr(),
        layout.block_size,
        layout.head_size,
        layout.bits,
        block_table_SM.data_ptr(),
        block_table_SM.stride(0),
        query_start_S1.data_ptr(),
        seq_lens_S.data_ptr(),
        seq_lens_S.shape[0],
        scale,
        order,
        torch.get_num_threads(),
    )


def _check_head_size(layout: PageLayout) -> None:
    if layout.head_size > _kv_int4.MAX_HEAD_SIZE:
        raise KVCacheError(
            f"backend cpp of the KV cache takes head sizes up to {_kv_int4.MAX_HEAD_SIZE}; got {layout.head_size}"
        )
