"""Quantized expert layers: quantizer, and layers that compute on packed weights.

`torch` is the specification (`reference.py`), `cpp` has its bits on the CPU and is what `auto` takes
there. Layout of the bytes: `layout.py`. Costs: `kernels/moe_int3/README.md`.

Shape suffixes: E matrices, N rows, K weights of a row, R rank, T tokens, S experts of a token.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from rl_accel.errors import MoEError, NotLiveError
from rl_accel.kernels.moe_int3.layout import Factors, QuantizedMatrix, check_width

BACKENDS = ("auto", "torch", "cpp", "triton")


def load_backend(name: str, device: torch.device | str = "cpu") -> ModuleType:
    """Return the module that serves a device.

    Raises:
        MoEError: for an unknown name, or one that cannot serve the device.
        NotLiveError: if the backend is not built or installed here.
    """
    if name not in BACKENDS:
        raise MoEError(f"backend {name!r} of quantized experts is unknown; known: {', '.join(BACKENDS)}")
    kind = torch.device(device).type
    if name == "auto":
        name = {"cpu": "cpp", "cuda": "triton"}.get(kind, "torch")
    if name == "cpp" and kind != "cpu":
        raise MoEError(f"backend cpp of quantized experts serves CPU tensors; got a tensor on {kind}")
    try:
        return importlib.import_module(f"rl_accel.kernels.moe_int3.{'reference' if name == 'torch' else name}")
    except ImportError as error:
        raise NotLiveError(f"backend {name} of quantized experts does not load: {error}") from error


def quantize(
    w_ENK: torch.Tensor, bits: int, group_size: int, iterations: int, *, backend: str = "auto"
) -> QuantizedMatrix:
    """Quantize matrices by least squares.

    Args:
        w_ENK: float32, contiguous.
        bits: 2, 3 or 4.
        group_size: 32 or 64 weights along K that share scale and offset.
        iterations: at most; 0 takes the best of four ranges, which is rounding to nearest with clipping.

    Raises:
        MoEError: for a shape, dtype or width that cannot be served.
    """
    if w_ENK.dtype != torch.float32 or w_ENK.dim() != 3 or not w_ENK.is_contiguous():
        raise MoEError(f"weights must be contiguous float32 [E, N, K]; got {w_ENK.dtype} {tuple(w_ENK.shape)}")
    check_width(bits, group_size, w_ENK.shape[-1])
    return load_backend(backend, w_ENK.device).quantize(w_ENK, bits, group_size, iterations)


def dequantize(matrix: QuantizedMatrix, *, backend: str = "auto") -> torch.Tensor:
    """Return float32 [E, N, K]."""
    matrix.check_integrity()
    return load_backend(backend, matrix.codes.device).dequantize(matrix)


def quantize_factor(x_RL: torch.Tensor, iterations: int, *, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows of a compensator, float32 [R, L]: codes uint8 [R, blocks * 32], scales float16 [R, blocks]."""
    return load_backend(backend, x_RL.device).quantize_factor(x_RL, iterations)


def dequantize_factor(codes: torch.Tensor, scales: torch.Tensor, length: int, *, backend: str = "auto") -> torch.Tensor:
    """Return rows of a compensator, float32 [R, length]."""
    return load_backend(backend, codes.device).dequantize_factor(codes, scales, length)


def linear(
    x_TK: torch.Tensor, matrix: QuantizedMatrix, factors: Factors | None = None, expert: int = 0, *,
    backend: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """Return W^ x + U^ (V^ x) of matrix `expert`, [T, N] of the dtype of x (float32, bfloat16, float16)."""
    return load_backend(backend, x_TK.device).linear(x_TK, matrix, factors, expert).to(x_TK.dtype)


def experts(
    x_TK: torch.Tensor, weights_TS: torch.Tensor, ids_TS: torch.Tensor, w13: QuantizedMatrix,
    w13_factors: Factors | None, w2: QuantizedMatrix, w2_factors: Factors | None, *, backend: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """Return the weighted sum of the experts of each token.

    Args:
        x_TK: float32, bfloat16 or float16 [T, hidden].
        weights_TS: float32, of the experts of a token.
        ids_TS: int32, their numbers; negative: none (an expert of another rank).
        w13: [E, 2 * intermediate, hidden], gate above up. w2: [E, hidden, intermediate]. SiLU between them.

    Returns:
        [T, hidden] of the dtype of x. A token's row depends on nothing but the token.
    """
    return load_backend(backend, x_TK.device).experts(x_TK, weights_TS, ids_TS, w13, w13_factors, w2, w2_factors)
