"""Counter-based Gumbel noise, and sampling with it.

The noise of a vocabulary entry is a pure function of (request key, absolute position of the token to be
sampled, vocabulary id). `argmax(logits + noise)` therefore samples softmax(logits), and the sample depends
on neither the batch, nor its order, nor on whether the token was drafted. Generator: SplitMix64 (Steele,
Lea, Flood, OOPSLA 2014), one stream per (key, position), one output per vocabulary id.

Left out: temperature, top-k and top-p; callers pass processed logits. Cost: two float64 logarithms per
logit. The PyTorch form holds a few float64 copies of one chunk (`CHUNK_ELEMENTS` each); the Triton form
holds none.

Shape suffixes: R rows (tokens to be sampled), V vocabulary.
"""

from __future__ import annotations

import json

import numpy as np
import torch

from rl_accel.identity import hash64

GAMMA = 0x9E3779B97F4A7C15
"""Increment of a SplitMix64 stream."""
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
"""Multipliers of the SplitMix64 output function."""
CHUNK_ELEMENTS = {"cpu": (1 << 15) - 1, "cuda": 1 << 23}
"""Most elements of a float64 temporary of the PyTorch form. On CPU it fits in cache and stays below the 2^15 elements
from which PyTorch starts threads: in so many small steps their barriers cost more than they gain, a hundredfold where
other processes use the same cores. Elsewhere 64 MiB."""


def request_key(seed: int, problem_id: str, sample_index: int, step: int, validate: bool, call: int = 0) -> int:
    """Return the 64-bit key of one generation of a rollout, the same in every process.

    Args:
        seed: the configured seed of the run.
        problem_id: stable name of the problem, such as a data-set id.
        sample_index: which of the samples of this problem in this step.
        step: training step, so that a problem drawn again gets new noise.
        validate: whether the rollout belongs to validation, which shares step numbers with training.
        call: which generation of the rollout; 0 is the first (`identity.CallNumbers`).

    Returns:
        signed int64, uniform over the arguments (BLAKE2b, 8 bytes).
    """
    identity = [int(seed), str(problem_id), int(sample_index), int(step), bool(validate)]
    if call:
        identity.append(int(call))
    return hash64(json.dumps(identity).encode())


def gumbel_noise(keys_R: torch.Tensor, positions_R: torch.Tensor, vocab_size: int, first_id: int = 0) -> torch.Tensor:
    """Return the noise of a range of vocabulary ids.

    Args:
        keys_R: int64 [R], request keys.
        positions_R: int64 [R], absolute position of the token to be sampled: 0 is the first token of the prompt.
        vocab_size: V, the number of ids.
        first_id: the first of them.

    Returns:
        float64 [R, V], standard Gumbel, within [-3.6, 36.75).
    """
    ids_V = torch.arange(first_id + 1, first_id + vocab_size + 1, dtype=torch.int64, device=keys_R.device)
    stream_R1 = (_mix(keys_R.clone()) + positions_R * _signed(GAMMA)).unsqueeze(1)
    bits_RV = _mix(_mix(stream_R1) + ids_V * _signed(GAMMA))
    # 52 bits and a half: never 0, and never 1 either, which 53 bits and a half would round to.
    uniform_RV = ((bits_RV >> 12) & ((1 << 52) - 1)).double().add_(0.5).mul_(2.0**-52)
    return _log_(_log_(uniform_RV).neg_()).neg_()


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
        from rl_accel.kernels.gumbel_argmax.kernel import gumbel_argmax as fused

        return fused(logits_RV, keys_R, positions_R)
    return gumbel_argmax_reference(logits_RV, keys_R, positions_R)


def gumbel_argmax_reference(logits_RV: torch.Tensor, keys_R: torch.Tensor, positions_R: torch.Tensor) -> torch.Tensor:
    """Specification of `gumbel_argmax` in PyTorch, on any device, a chunk of rows or of a row at a time."""
    vocab_size = logits_RV.shape[1]
    elements = CHUNK_ELEMENTS.get(logits_RV.device.type, CHUNK_ELEMENTS["cuda"])
    chunk_rows, chunk_ids = max(1, elements // vocab_size), min(elements, vocab_size)
    chunks = zip(
        logits_RV.split(chunk_rows),
        keys_R.split(chunk_rows),
        positions_R.to(torch.int64).split(chunk_rows),
        strict=True,
    )
    return torch.cat([_best_of_chunk(*chunk, chunk_ids) for chunk in chunks])


def _best_of_chunk(
    logits_RV: torch.Tensor, keys_R: torch.Tensor, positions_R: torch.Tensor, chunk_ids: int
) -> torch.Tensor:
    best_R = torch.full(keys_R.shape, -torch.inf, dtype=torch.float64, device=keys_R.device)
    token_ids_R = torch.zeros_like(keys_R)
    for first_id, logits in zip(
        range(0, logits_RV.shape[1], chunk_ids), logits_RV.split(chunk_ids, dim=1), strict=True
    ):
        scores = gumbel_noise(keys_R, positions_R, logits.shape[1], first_id).add_(logits)
        index_R = scores.nan_to_num_(-torch.inf, torch.inf, -torch.inf).argmax(dim=1)
        score_R = scores.gather(1, index_R[:, None])[:, 0]
        better_R = score_R > best_R  # strictly: ties go to the lowest id
        best_R = torch.where(better_R, score_R, best_R)
        token_ids_R = torch.where(better_R, index_R + first_id, token_ids_R)
    return token_ids_R


def _log_(x: torch.Tensor) -> torch.Tensor:
    """Logarithm in place; by NumPy on CPU, where PyTorch's starts threads however few the elements."""
    if x.device.type != "cpu":
        return x.log_()
    array = x.numpy()
    np.log(array, out=array)
    return x


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Apply the SplitMix64 output function in place to int64 values taken as 64 bits."""
    x ^= (x >> 30) & ((1 << 34) - 1)
    x *= _signed(MIX_1)
    x ^= (x >> 27) & ((1 << 37) - 1)
    x *= _signed(MIX_2)
    x ^= (x >> 31) & ((1 << 33) - 1)
    return x


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


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
