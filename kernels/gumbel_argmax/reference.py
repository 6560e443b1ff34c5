"""Counter-based Gumbel noise and sampling with it, in PyTorch: the specification.

The noise of a vocabulary entry is a pure function of (request key, absolute position of the token to be
sampled, vocabulary id). `argmax(logits + noise)` therefore samples softmax(logits), and the sample depends
on neither the batch, nor its order, nor on whether the token was drafted. Generator: SplitMix64
(`kernels/common/noise.py`), one stream per (key, position), one output per vocabulary id.

Left out: temperature, top-k and top-p; callers pass processed logits. Cost: two float64 logarithms per
logit, and a few float64 copies of one chunk (`CHUNK_ELEMENTS` each).

Shape suffixes: R rows (tokens to be sampled), V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch

from rl_accel.kernels.common.noise import GAMMA, mix64_, signed

CHUNK_ELEMENTS = {"cpu": (1 << 15) - 1, "cuda": 1 << 23}
"""Most elements of a float64 temporary of the PyTorch form. On CPU it fits in cache and stays below the 2^15 elements
from which PyTorch starts threads: in so many small steps their barriers cost more than they gain, a hundredfold where
other processes use the same cores. Elsewhere 64 MiB."""


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
    stream_R1 = (mix64_(keys_R.clone()) + positions_R * signed(GAMMA)).unsqueeze(1)
    bits_RV = mix64_(mix64_(stream_R1) + ids_V * signed(GAMMA))
    # 52 bits and a half: never 0, and never 1 either, which 53 bits and a half would round to.
    uniform_RV = ((bits_RV >> 12) & ((1 << 52) - 1)).double().add_(0.5).mul_(2.0**-52)
    return _log_(_log_(uniform_RV).neg_()).neg_()


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
