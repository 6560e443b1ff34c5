"""Sampling one token per row by position-keyed Gumbel noise: what callers import. Maths and cost: README.md.

Shape suffixes: R rows (tokens to be sampled), V vocabulary.
"""

from __future__ import annotations

import torch

from rl_accel.kernels.gumbel_argmax.reference import gumbel_argmax_reference


def gumbel_argmax(logits_RV: torch.Tensor, keys_R: torch.Tensor, positions_R: torch.Tensor) -> torch.Tensor:
    """Sample one token per row from softmax(logits).

    Runs the Triton kernel on CUDA tensors and PyTorch elsewhere. Both draw the same noise up to the last bit
    of a float64 logarithm.

    Args:
        logits_RV: [R, V], any floating dtype, fully processed (temperature, top-k, top-p, masks). An entry
            that is -inf or NaN never wins; a row of nothing else returns 0; +inf always wins; ties go to the
            lowest id.
        keys_R: int64 [R], request keys.
        positions_R: integer [R], absolute position of the token to be sampled.

    Returns:
        int64 [R], token ids.

    Raises:
        ValueError: on a wrong shape, dtype or device.
    """
    _check(logits_RV, keys_R, positions_R)
    if logits_RV.is_cuda:
        from rl_accel.kernels.gumbel_argmax.triton import gumbel_argmax as fused

        return fused(logits_RV, keys_R, positions_R)
    return gumbel_argmax_reference(logits_RV, keys_R, positions_R)


def _check(logits_RV: torch.Tensor, keys_R: torch.Tensor, positions_R: torch.Tensor) -> None:
    if logits_RV.ndim != 2 or logits_RV.shape[1] == 0 or not logits_RV.is_floating_point():
        raise ValueError(
            f"logits: expected a floating [R, V] tensor with V >= 1, got {logits_RV.dtype} {tuple(logits_RV.shape)}"
        )
    for name, x_R in (("keys", keys_R), ("positions", positions_R)):
        if x_R.shape != logits_RV.shape[:1] or x_R.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"{name}: expected an integer tensor of shape ({logits_RV.shape[0]},), one entry per logits "
                f"row, got {x_R.dtype} {tuple(x_R.shape)}"
            )
        if x_R.device != logits_RV.device:
            raise ValueError(f"{name}: expected on {logits_RV.device} like the logits, got {x_R.device}; move it there")
    if keys_R.dtype != torch.int64:
        raise ValueError(f"keys: expected int64, got {keys_R.dtype}; make them with request_key()")
