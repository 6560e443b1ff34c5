"""Group-wise symmetric 4- and 8-bit codec for what ranks send each other, with three backends of equal results.

`auto` takes Triton for CUDA tensors and C++ for the CPU; `torch` is the specification (`reference.py`). A block's codes
and scales share one uint8 buffer (`layout.py`). Costs: `kernels/codec/README.md`.
"""

from __future__ import annotations

from types import ModuleType

import torch

from rl_accel.errors import CommError, NotLiveError
from rl_accel.kernels.codec import layout, reference
from rl_accel.kernels.codec.layout import packed_bytes
from rl_accel.kernels.codec.rows import Rows
from rl_accel.kernels.common.noise import fold_key

BACKENDS = ("auto", "torch", "cpp", "triton")
ROUNDINGS = ("nearest", "stochastic")
_FLOATS = (torch.float32, torch.bfloat16)


def load_backend(name: str, device: torch.device | str = "cpu") -> ModuleType:
    """Return the module that holds `quantize`, `dequantize` and `requantize` for a backend and a device.

    Raises:
        CommError: for an unknown name, or one that cannot serve the device.
        NotLiveError: if the backend is not built or installed here.
    """
    kind = torch.device(device).type
    if name == "auto":
        name = "triton" if kind == "cuda" else "cpp" if kind == "cpu" else "torch"
    if name == "torch":
        return reference
    if name not in BACKENDS:
        raise CommError(f"codec backend {name!r} is unknown; known: {', '.join(BACKENDS)}")
    if name == "cpp" and kind != "cpu":
        raise CommError(f"codec backend cpp serves CPU tensors; got a tensor on {kind}")
    try:
        if name == "cpp":
            from rl_accel.kernels.codec import cpp as backend
        else:
            from rl_accel.kernels.codec import triton as backend
    except ImportError as error:
        raise NotLiveError(f"codec backend {name} does not load: {error}") from error
    return backend


def quantize(
    x: torch.Tensor,
    bits: int = 4,
    group_size: int = 128,
    rounding: str = "nearest",
    seed: int = 0,
    offset: int = 0,
    *,
    step: int = 0,
    subtract: torch.Tensor | None = None,
    hadamard: bool = False,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Quantize a block; with `subtract` its difference to what the receivers hold.

    Args:
        x: float32 or bfloat16, contiguous, any shape; N values.
        bits: 4 (codes -7 to 7) or 8 (-127 to 127).
        group_size: values per scale, a power of two from 32 to 32,768.
        rounding: `nearest` (half to even) or `stochastic` (unbiased; a function of seed, step and offset + i).
        seed, step: any 64-bit integers.
        offset: global index of the first value, a multiple of `group_size`.
        subtract: float32 or bfloat16 [N].
        hadamard: rotate every 32 values before (SDP4Bit §3.3).
        out: uint8 [packed_bytes(N, bits, group_size)], contiguous and aligned to 4 bytes; made if None.
        backend: `auto`, `torch`, `cpp` or `triton`.

    Returns:
        uint8 [packed_bytes(N, bits, group_size)], `out` if given.

    Raises:
        CommError: for a wrong shape, dtype, device or format.
    """
    layout.check_format(bits, group_size)
    _check_values("x", x)
    if subtract is not None:
        _check_values("subtract", subtract, x.numel(), x.device)
    num_bytes = packed_bytes(x.numel(), bits, group_size)
    out = _checked_buffer(out, num_bytes, x.device)
    load_backend(backend, x.device).quantize(
        out,
        x.view(-1),
        None if subtract is None else subtract.view(-1),
        bits,
        group_size,
        _is_stochastic(rounding),
        fold_key(seed, step),
        _checked_offset(offset, group_size),
        hadamard,
    )
    return out


def dequantize(
    blocks: torch.Tensor,
    numel: int,
    bits: int = 4,
    group_size: int = 128,
    *,
    hadamard: bool = False,
    out: torch.Tensor | None = None,
    add: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Return the values of a block, or the sum of several.

    Args:
        blocks: uint8 [B] or [R, B], contiguous; B = packed_bytes(numel, bits, group_size). Summed in order, in float32.
        numel: values N.
        hadamard: the blocks were rotated; rotate the sum back.
        out: float32 or bfloat16 [N]; a float32 tensor is made if None.
        add: add to `out` (rounded once, to its dtype) instead of overwriting it.

    Returns:
        [N], `out` if given.

    Raises:
        CommError: for a wrong shape, dtype, device or format.
    """
    layout.check_format(bits, group_size)
    blocks = _checked_blocks(blocks, packed_bytes(numel, bits, group_size))
    if out is None:
        if add:
            raise CommError("add=True needs `out`, the tensor to add to")
        out = torch.empty(numel, dtype=torch.float32, device=blocks.device)
    _check_values("out", out, numel, blocks.device)
    load_backend(backend, blocks.device).dequantize(out.view(-1), blocks, bits, group_size, hadamard, add)
    return out


def dequantize_add(block: torch.Tensor, out: torch.Tensor, bits: int = 4, group_size: int = 128, **options) -> None:
    """Add a block's values to `out`: applies a weight difference that came from `quantize(..., subtract=held)`."""
    dequantize(block, out.numel(), bits, group_size, out=out, add=True, **options)


def quantize_rows(
    x: torch.Tensor,
    rows: Rows,
    bits: int = 4,
    group_size: int = 128,
    rounding: str = "nearest",
    seed: int = 0,
    offset: int = 0,
    *,
    step: int = 0,
    subtract: torch.Tensor | None = None,
    hadamard: bool = False,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Quantize pieces of a tensor into D blocks in one call: what each of D receivers gets.

    Args:
        rows: which values go where; its `numel` is a multiple of `group_size`.
        out: uint8 [D, packed_bytes(rows.numel, bits, group_size)]; made of zeros if None. Groups that no piece covers
            stay as they are.
        x, bits, group_size, rounding, seed, step, offset, subtract, hadamard, backend: as `quantize`; the noise of
            position i of all rows is that of offset + i.

    Returns:
        `out`.

    Raises:
        CommError: for a wrong shape, dtype, device or format.
    """
    layout.check_format(bits, group_size)
    _check_values("x", x)
    if subtract is not None:
        _check_values("subtract", subtract, x.numel(), x.device)
    _check_rows(rows, x, group_size)
    shape = (rows.num_rows, packed_bytes(rows.numel, bits, group_size))
    if out is None:
        out = torch.zeros(shape, dtype=torch.uint8, device=x.device)
    _checked_buffer(out.view(-1) if out.is_contiguous() else out, shape[0] * shape[1], x.device)
    if len(rows.pieces_K4):
        load_backend(backend, x.device).quantize_rows(
            out.view(-1),
            rows,
            x.view(-1),
            None if subtract is None else subtract.view(-1),
            bits,
            group_size,
            _is_stochastic(rounding),
            fold_key(seed, step),
            _checked_offset(offset, group_size),
            hadamard,
        )
    return out


def dequantize_rows(
    blocks: torch.Tensor,
    rows: Rows,
    out: torch.Tensor,
    bits: int = 4,
    group_size: int = 128,
    *,
    hadamard: bool = False,
    add: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Write pieces of D blocks, or the sums of R times D blocks, to where they are in a tensor, in one call.

    Args:
        blocks: uint8 [R, D * B] or [D * B], contiguous; B = packed_bytes(rows.numel, bits, group_size). Summed in
            order, in float32.
        rows: which values go where.
        out: float32 or bfloat16, contiguous. Values that no piece names stay as they are.
        hadamard, add, backend: as `dequantize`.

    Returns:
        `out`.

    Raises:
        CommError: for a wrong shape, dtype, device or format.
    """
    layout.check_format(bits, group_size)
    blocks = _checked_blocks(blocks, rows.num_rows * packed_bytes(rows.numel, bits, group_size))
    _check_values("out", out, None, blocks.device)
    _check_rows(rows, out, group_size)
    if len(rows.pieces_K4):
        load_backend(backend, blocks.device).dequantize_rows(
            out.view(-1), blocks, rows, bits, group_size, hadamard, add
        )
    return out


def requantize(
    blocks: torch.Tensor,
    numel: int,
    from_bits: int,
    from_group_size: int,
    bits: int = 4,
    group_size: int = 128,
    rounding: str = "nearest",
    seed: int = 0,
    offset: int = 0,
    *,
    step: int = 0,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Sum R blocks and quantize the sum in another format: between the two hops of a reduce-scatter. A rotated sum
    stays rotated.

    Args:
        blocks: uint8 [R, packed_bytes(numel, from_bits, from_group_size)] or one block; otherwise as `quantize`.

    Returns:
        uint8 [packed_bytes(numel, bits, group_size)], `out` if given.

    Raises:
        CommError: for a wrong shape, dtype, device or format.
    """
    layout.check_format(from_bits, from_group_size)
    layout.check_format(bits, group_size)
    blocks = _checked_blocks(blocks, packed_bytes(numel, from_bits, from_group_size))
    out = _checked_buffer(out, packed_bytes(numel, bits, group_size), blocks.device)
    load_backend(backend, blocks.device).requantize(
        out,
        blocks,
        numel,
        from_bits,
        from_group_size,
        bits,
        group_size,
        _is_stochastic(rounding),
        fold_key(seed, step),
        _checked_offset(offset, group_size),
    )
    return out


def _check_values(name: str, x: torch.Tensor, numel: int | None = None, device: torch.device | None = None) -> None:
    if x.dtype not in _FLOATS:
        raise CommError(f"{name} must be float32 or bfloat16; got {x.dtype}. Cast it first")
    if not x.is_contiguous():
        raise CommError(f"{name} must be contiguous; got strides {x.stride()} for shape {tuple(x.shape)}")
    if numel is not None and x.numel() != numel:
        raise CommError(f"{name} must have {numel} values; got {x.numel()}")
    if device is not None and x.device != device:
        raise CommError(f"{name} must be on {device}; it is on {x.device}")


def _check_rows(rows: Rows, x: torch.Tensor, group_size: int) -> None:
    if rows.numel % group_size:
        raise CommError(f"rows must be whole groups of {group_size} values; got {rows.numel}")
    if rows.min_tensor_numel > x.numel():
        raise CommError(f"rows name values up to {rows.min_tensor_numel}; the tensor has {x.numel()}")


def _checked_buffer(out: torch.Tensor | None, num_bytes: int, device: torch.device) -> torch.Tensor:
    if out is None:
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    if out.dtype != torch.uint8 or out.shape != (num_bytes,) or not out.is_contiguous() or out.device != device:
        raise CommError(
            f"out must be a contiguous uint8 tensor of {num_bytes} bytes on {device}; got {out.dtype} "
            f"{tuple(out.shape)} on {out.device}"
        )
    if out.data_ptr() % 4:
        raise CommError("out must start at a multiple of 4 bytes: the scales in it are float32")
    return out


def _checked_blocks(blocks: torch.Tensor, num_bytes: int) -> torch.Tensor:
    if blocks.dim() == 1:
        blocks = blocks.unsqueeze(0)
    if blocks.dtype != torch.uint8 or blocks.dim() != 2 or blocks.shape[1] != num_bytes or not blocks.is_contiguous():
        raise CommError(
            f"blocks must be contiguous uint8 [R, {num_bytes}] or [{num_bytes}]; got {blocks.dtype} "
            f"{tuple(blocks.shape)}"
        )
    if not blocks.shape[0]:
        raise CommError("there must be at least one block")
    if blocks.data_ptr() % 4:
        raise CommError("blocks must start at a multiple of 4 bytes: the scales in them are float32")
    return blocks


def _is_stochastic(rounding: str) -> bool:
    if rounding not in ROUNDINGS:
        raise CommError(f"rounding must be one of {', '.join(ROUNDINGS)}; got {rounding!r}")
    return rounding == "stochastic"


def _checked_offset(offset: int, group_size: int) -> int:
    if offset < 0 or offset % group_size:
        raise CommError(f"offset must be a multiple of group_size={group_size}, not negative; got {offset}")
    return offset
