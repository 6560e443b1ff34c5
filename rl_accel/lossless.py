"""Statistics that tell whether sampled tokens follow a target distribution.

`chi_square` is the test (Pearson's goodness of fit), `total_variation` the size of a deviation. A test
rejects a sampler that is right with probability `alpha`, which every result carries. Left out: power
analysis; the negative controls in the tests show that a wrong sampler is found. Cost: O(V) on the host.

Shape suffix: V outcomes (tokens, or tuples of tokens numbered through).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

DEFAULT_ALPHA = 1e-6
"""Probability to reject a right sampler, per test. Small because a project runs hundreds of these tests."""
MIN_EXPECTED = 5.0
"""Outcomes expected less often than this are pooled (Cochran 1954), so that the chi-square distribution holds."""


@dataclass(frozen=True)
class ChiSquareResult:
    """Outcome of a goodness-of-fit test."""

    statistic: float
    """Pearson's sum; inf if an impossible outcome occurred."""
    dof: int
    """Degrees of freedom after pooling."""
    p_value: float
    """Probability of a statistic at least this large under the target distribution."""
    alpha: float
    """Level of the test."""

    @property
    def passed(self) -> bool:
        """Whether the samples are compatible with the target distribution at level `alpha`."""
        return self.p_value >= self.alpha


def count_tokens(tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return int64 [V], how often each id occurs in an integer tensor of any shape.

    Raises:
        ValueError: if an id is outside [0, V).
    """
    tokens = tokens.reshape(-1).to("cpu", torch.int64)
    if tokens.numel() and not (int(tokens.min()) >= 0 and int(tokens.max()) < vocab_size):
        raise ValueError(f"expected ids in [0, {vocab_size}), got {int(tokens.min())} to {int(tokens.max())}")
    return torch.bincount(tokens, minlength=vocab_size)


def chi_square(counts_V: torch.Tensor, target_V: torch.Tensor, alpha: float = DEFAULT_ALPHA) -> ChiSquareResult:
    """Test observed counts against a target distribution.

    Args:
        counts_V: integer [V], observed counts.
        target_V: floating [V], probabilities; normalized here.
        alpha: level of the test.

    Returns:
        the result. A count where the target is zero gives p = 0. If pooling leaves a single bin, nothing can
        be tested and p = 1.

    Raises:
        ValueError: on shapes that differ, an empty sample, or a target that is no distribution.
    """
    observed_V, target_V = _checked(counts_V, target_V)
    if bool((observed_V[target_V == 0] > 0).any()):
        return ChiSquareResult(float("inf"), max(1, int((target_V > 0).sum()) - 1), 0.0, alpha)
    observed, expected = _pool(observed_V, target_V * observed_V.sum())
    statistic = ((observed - expected) ** 2 / expected).sum()
    dof = len(expected) - 1
    p_value = chi_square_p_value(float(statistic), dof) if dof else 1.0
    return ChiSquareResult(float(statistic), dof, p_value, alpha)


def chi_square_p_value(statistic: float, dof: int) -> float:
    """Return P[X >= statistic] for X chi-square with `dof` >= 1 degrees of freedom."""
    half = torch.tensor([dof / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def total_variation(counts_V: torch.Tensor, target_V: torch.Tensor) -> float:
    """Return half the L1 distance of observed frequencies and target probabilities, in [0, 1].

    A right sampler gives about sqrt(V / (2 pi n)) for n samples spread over V outcomes, not zero.

    Raises:
        ValueError: as `chi_square`.
    """
    observed_V, target_V = _checked(counts_V, target_V)
    return float((observed_V / observed_V.sum() - target_V).abs().sum() / 2)


def _pool(observed_V: torch.Tensor, expected_V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the rarest outcomes until every bin is expected at least MIN_EXPECTED times; sorts the bins."""
    order = expected_V.argsort()
    observed, expected = observed_V[order], expected_V[order]
    pooled = int((expected < MIN_EXPECTED).sum())
    while 0 < pooled < len(expected) and float(expected[:pooled].sum()) < MIN_EXPECTED:
        pooled += 1
    if pooled <= 1:
        return observed, expected

    def merge(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:pooled].sum(dim=0, keepdim=True), x[pooled:]])

    return merge(observed), merge(expected)


def _checked(counts_V: torch.Tensor, target_V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if counts_V.ndim != 1 or counts_V.shape != target_V.shape:
        raise ValueError(
            f"expected counts and target of one shape [V], got {tuple(counts_V.shape)} and {tuple(target_V.shape)}"
        )
    observed_V, target_V = counts_V.to("cpu", torch.float64), target_V.to("cpu", torch.float64)
    if float(observed_V.sum()) <= 0:
        raise ValueError("expected at least one observation, got none")
    if not bool((target_V >= 0).all()) or not 0 < float(target_V.sum()) < float("inf"):
        raise ValueError("expected non-negative finite target probabilities with a positive sum")
    return observed_V, target_V / target_V.sum()
