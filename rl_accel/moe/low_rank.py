"""The best low-rank approximation of a batch of residuals, three ways.

    exact        eigenvectors of the smaller Gram matrix; cost min(N, K)^3 a matrix
    randomized   subspace iteration from a fixed Gaussian sketch (Halko et al. 2011); cost N K r
    warm         one subspace step from factors that are near; cost N K r, a fourth of `randomized`

The sketch is the same for every matrix and every call, so the result is a function of the residual alone. Everything
is in float32, whatever the default dtype is. On a CPU each matrix goes through by itself, on one thread (`each`): a
batched product, or one of several threads, may round otherwise, and a loop of roundings to codes makes much of that.

Shape suffixes: E matrices, N rows, K columns, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

EXACT_MAX_DIM = 512
"""Up to which `auto` takes the exact way: there eigh costs about what the iteration does."""
OVERSAMPLING, POWER_STEPS = 8, 2
METHODS = ("auto", "exact", "randomized")


def each(function: Callable[..., Any], *stacks: torch.Tensor) -> Any:
    """Return `function` of tensors [E, ...], its results stacked; on a CPU computed matrix by matrix, on one thread."""
    if stacks[0].device.type != "cpu":
        return function(*stacks)
    with _one_thread():
        found = [function(*(stack[i : i + 1] for stack in stacks)) for i in range(len(stacks[0]))]
    if isinstance(found[0], tuple):
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))
    return torch.cat(found)


@contextmanager
def _one_thread() -> Iterator[None]:
    """vLLM's CPU worker replaces `torch.set_num_threads` by nothing, hence the function behind it."""
    threads = torch.get_num_threads()
    torch._C.set_num_threads(1)
    try:
        yield
    finally:
        torch._C.set_num_threads(threads)


def low_rank(
    residual_ENK: torch.Tensor, rank: int, method: str = "auto", near_ERK: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return U [E, N, R] and V [E, R, K] whose product is near the residual, singular values split evenly.

    Args:
        residual_ENK: float32.
        rank: at most min(N, K).
        method: of `METHODS`; not used with `near_ERK`.
        near_ERK: rows that span nearly what V will; rows of zeros carry nothing.
    """
    if near_ERK is not None:
        return each(lambda residual, near: _split(residual, _step(residual, near), rank), residual_ENK, near_ERK)
    exact = method == "exact" or (method == "auto" and min(residual_ENK.shape[-2:]) <= EXACT_MAX_DIM)
    basis = _exact if exact else _sketched
    return each(lambda residual: _split(residual, basis(residual, rank), rank), residual_ENK)


def _step(residual_ENK: torch.Tensor, near_ERK: torch.Tensor) -> torch.Tensor:
    return _orthonormal(residual_ENK.mT @ (residual_ENK @ _orthonormal(near_ERK.mT)))


def _exact(residual_ENK: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the first right singular vectors [E, K, R]."""
    num_rows, num_columns = residual_ENK.shape[-2:]
    if num_columns <= num_rows:
        return torch.linalg.eigh(residual_ENK.mT @ residual_ENK)[1][..., -rank:]
    left_ENR = torch.linalg.eigh(residual_ENK @ residual_ENK.mT)[1][..., -rank:]
    return _orthonormal(residual_ENK.mT @ left_ENR)


def _sketched(residual_ENK: torch.Tensor, rank: int) -> torch.Tensor:
    width = min(rank + OVERSAMPLING, *residual_ENK.shape[-2:])
    generator = torch.Generator().manual_seed(0)
    sketch = torch.randn(residual_ENK.shape[-1], width, generator=generator, dtype=torch.float32)
    basis = _orthonormal(residual_ENK.mT @ (residual_ENK @ sketch.to(residual_ENK.device)))
    for _ in range(POWER_STEPS - 1):
        basis = _orthonormal(residual_ENK.mT @ (residual_ENK @ basis))
    return basis


def _split(residual_ENK: torch.Tensor, basis_EKB: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    image_ENB = residual_ENK @ basis_EKB
    rotation = torch.linalg.eigh(image_ENB.mT @ image_ENB)[1].flip(-1)[..., :rank]
    image_ENR, basis_EKR = image_ENB @ rotation, basis_EKB @ rotation
    values_ER = image_ENR.norm(dim=-2).clamp(min=1e-30)
    roots = values_ER.sqrt()
    return image_ENR / roots[..., None, :], (basis_EKR * roots[..., None, :]).mT


def _orthonormal(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(x)[0]
