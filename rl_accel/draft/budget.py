"""How many draft tokens each live request should propose so that the last request ends early.

A request with l tokens left that proposes p of them over the rest of its life has A(p) = k l (1 - exp(-alpha p / l))
accepted (DAS Eq 4) and takes l - A(p) steps; the batch takes N = max_i (l_i - A_i(p_i)). Minimized is

    J = base_s * N + sum_i [ per_request_s * (l_i - A_i(p_i)) + per_draft_s * p_i ]   seconds,

convex in all p_i. Its multipliers, the seconds that one token less of request i saves by ending the batch earlier, sum
to base_s; they turn a length forecast into the path probability from which on a draft token is worth its cost.

Source: DAS §4.2; differs: the middle term (theirs has per_request_s = 0); Eq 7 and 9 as printed do not solve their own
constraint unless k = 1, the inverse of Eq 4 used here is -(l / alpha) ln(1 - (1 - N / l) / k).
Left out: the token limit and KV-cache limit of a step; costs are linear.
Cost: 512 requests x 8 scenarios take about 0.5 ms.

Shape suffixes: N requests, S scenarios.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rl_accel.draft.lengths import LONG, MEDIUM
from rl_accel.errors import DraftError

BISECTIONS, FORECAST_BISECTIONS = 40, 10
"""The interval of N is halved so often for known lengths, and for sampled ones, which scatter far more than 1e-3."""
FREE_DRAFT = 1e-9
"""Least cost of a draft token, as a share of base_s + per_request_s: free drafts would be proposed without end."""
MIN_PROBABILITY = 0.01
"""Least threshold; the estimates of path probabilities mean little below."""
MIN_LENGTH, MIN_ACCEPTED, TINY = 1e-9, 1e-12, 1e-300
"""Floors of divisors."""

Array = np.ndarray | float


class StepCosts(Protocol):
    """What a step costs, in seconds; `StepCostModel` and `FixedCosts` are such."""

    @property
    def base_s(self) -> float: ...
    @property
    def per_request_s(self) -> float: ...
    @property
    def per_draft_s(self) -> float: ...


@dataclass(frozen=True)
class FixedCosts:
    """Seconds of a step without requests, of a live request, of a draft token."""

    base_s: float
    per_request_s: float
    per_draft_s: float


@dataclass(frozen=True)
class Plan:
    """The optimum: N, p_i float64 [N], multipliers float64 [N] in seconds a token, J in seconds."""

    num_steps: float
    proposed: np.ndarray
    multipliers: np.ndarray
    seconds: float


def acceptance(proposed: Array, lengths: Array, k: Array, alpha: Array) -> Array:
    """Return A(p), the tokens accepted of p proposed while a request generates l > 0 more tokens (DAS Eq 4).

    Args:
        proposed: p, tokens proposed over the rest of the request.
        lengths: l, tokens left.
        k: share of them that drafts can reach at most, in (0, 1].
        alpha: efficiency; k * alpha is the chance of the first proposed token.
    """
    return -k * lengths * np.expm1(-alpha * proposed / lengths)


def proposed_tokens(num_steps: Array, lengths: Array, k: Array, alpha: Array) -> Array:
    """Return the p that leaves `num_steps` = l - A(p): 0 from l steps on, inf for l (1 - k) and fewer."""
    missed = 1.0 - np.maximum(1.0 - num_steps / lengths, 0.0) / k
    with np.errstate(divide="ignore"):
        return 0.0 - lengths / alpha * np.log(np.maximum(missed, 0.0))


def makespan_optimum(lengths: np.ndarray, k: Array, alpha: Array, cost: StepCosts) -> Plan:
    """Minimize J for known lengths.

    Args:
        lengths: [N], tokens left of each live request, not negative.
        k: [N] or scalar, in (0, 1], as in `acceptance`.
        alpha: [N] or scalar, above zero.
        cost: seconds of base, request and draft token.

    Returns:
        The plan. Its multipliers are zero for requests that end before step N by their own best p, and sum to base_s.

    Raises:
        DraftError: if an argument is out of range.
    """
    lengths_SN, k_N, alpha_N = _checked(np.asarray(lengths)[None], k, alpha, cost)
    if lengths_SN.size == 0:
        return Plan(0.0, np.zeros(0), np.zeros(0), 0.0)
    num_steps_S, multipliers_SN, free_SN = _solve(lengths_SN, k_N, alpha_N, cost, BISECTIONS)
    tight_SN = proposed_tokens(num_steps_S[:, None], lengths_SN, k_N, alpha_N)
    proposed_N = np.maximum(free_SN, tight_SN)[0]
    steps_N = lengths_SN[0] - acceptance(proposed_N, lengths_SN[0], k_N, alpha_N)
    num_steps = float(steps_N.max())
    own_s = cost.per_request_s * steps_N.sum() + cost.per_draft_s * proposed_N.sum()
    return Plan(num_steps, proposed_N, multipliers_SN[0], float(cost.base_s * num_steps + own_s))


def expected_multipliers(remaining: np.ndarray, k: Array, alpha: Array, costs: StepCosts) -> np.ndarray:
    """Return what one accepted token of each request is worth beyond per_request_s, in seconds, lengths uncertain.

    The mean of the multipliers over sampled lengths; it sums to base_s. A multiplier is what the least J falls by when
    a request takes one step less, beyond per_request_s. Each scenario is solved as if its lengths were known, so the
    mean costs a token of the present step on the premise that later steps act on what they learn. Requests that
    cannot be told apart tend to base_s / N each: a token is then worth the step time per live request, the throughput
    rule. A request that is the last one by far in every scenario gets all of base_s.

    Few scenarios are noisy: few requests are tight in each, so of 512 equal requests (log-normal lengths, sigma 0.8) a
    multiplier from 8 scenarios scatters by 7 times its mean, from 64 by 2.5 times. Average over steps before use.

    Args:
        remaining: [S, N], sampled tokens left, as `LengthModel.remaining` returns them.
        k: [N] or scalar, in (0, 1], as in `acceptance`.
        alpha: [N] or scalar, above zero.
        costs: seconds of base, request and draft token.

    Returns:
        float64 [N], not negative.
    """
    lengths_SN, k_N, alpha_N = _checked(remaining, k, alpha, costs)
    if lengths_SN.size == 0:
        return np.zeros(lengths_SN.shape[1])
    return _solve(lengths_SN, k_N, alpha_N, costs, FORECAST_BISECTIONS)[1].mean(axis=0)


def min_path_probs(multipliers: np.ndarray, costs: StepCosts) -> np.ndarray:
    """Return the least path probability from which on a draft token of each request is worth its cost, float32 [N].

    A draft token accepted with probability q is worth it if q * (multiplier + per_request_s) > per_draft_s. The result
    is at least 0.01; above 1 the request should not draft at all.
    """
    worth_N = np.asarray(multipliers, np.float64) + costs.per_request_s
    probability_N = np.full(worth_N.shape, np.inf)
    with np.errstate(over="ignore"):
        np.divide(costs.per_draft_s, worth_N, out=probability_N, where=worth_N > 0.0)
        return np.maximum(probability_N, MIN_PROBABILITY).astype(np.float32)


def class_max_draft(length_class: np.ndarray, max_draft: int) -> np.ndarray:
    """Return the draft tokens a step of each request by the policy DAS deploys, int32 [N].

    Long requests get `max_draft`, medium ones a quarter of it but at least 1, short ones none. DAS §4.2 gives the
    classes and their order; it prints no numbers, the quarter is ours.
    """
    if max_draft < 0:
        raise DraftError(f"expected max_draft >= 0, got {max_draft}")
    medium = min(max(max_draft // 4, 1), max_draft)
    max_draft_tokens_N = np.where(length_class == LONG, max_draft, np.where(length_class == MEDIUM, medium, 0))
    return max_draft_tokens_N.astype(np.int32)


def _solve(
    lengths_SN: np.ndarray, k_N: np.ndarray, alpha_N: np.ndarray, costs: StepCosts, bisections: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return N [S], multipliers [S, N] and each request's own best p [S, N] for every scenario.

    A request is tight for N below its kink, the steps it takes at its own best p. Its multiplier there is per_draft_s
    / A'(p) - per_request_s, falls with N and, where the own best p is 0, jumps to zero at the kink. So the sum crosses
    base_s once. If it crosses at a jump, the requests there share what the tight ones leave of base_s in proportion to
    their jumps: equally if they are equal, and within the subdifferential if they are not.
    """
    base_s, request_s = costs.base_s, costs.per_request_s
    draft_s = max(costs.per_draft_s, FREE_DRAFT * (base_s + request_s))
    gain_N = np.maximum(k_N * alpha_N * request_s / draft_s, 1.0)
    kink_SN = lengths_SN * (1.0 - k_N * (1.0 - 1.0 / gain_N))
    slope_SN, offset_N = alpha_N / lengths_SN, alpha_N * (k_N - 1.0)

    def multipliers(num_steps_S: np.ndarray) -> np.ndarray:
        num_steps_S1 = num_steps_S[:, None]
        accepted_SN = slope_SN * num_steps_S1  # becomes A'(p), the chance of the last token proposed
        accepted_SN += offset_N
        np.maximum(accepted_SN, MIN_ACCEPTED, out=accepted_SN)
        np.divide(draft_s, accepted_SN, out=accepted_SN)
        accepted_SN -= request_s
        return np.maximum(accepted_SN, 0.0, out=accepted_SN) * (num_steps_S1 < kink_SN)

    low_S, high_S = (lengths_SN * (1.0 - k_N)).max(axis=1), kink_SN.max(axis=1)
    for _ in range(bisections):
        middle_S = 0.5 * (low_S + high_S)
        too_few_S = multipliers(middle_S).sum(axis=1) > base_s
        low_S, high_S = np.where(too_few_S, middle_S, low_S), np.where(too_few_S, high_S, middle_S)

    at_low_SN, at_high_SN = multipliers(low_S), multipliers(high_S)
    sum_low_S, sum_high_S = at_low_SN.sum(axis=1), at_high_SN.sum(axis=1)
    share_S1 = ((base_s - sum_high_S) / np.maximum(sum_low_S - sum_high_S, TINY)).clip(0.0, 1.0)[:, None]
    return high_S, at_high_SN + share_S1 * (at_low_SN - at_high_SN), lengths_SN / alpha_N * np.log(gain_N)


def _checked(
    lengths: np.ndarray, k: Array, alpha: Array, costs: StepCosts
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return float64 lengths [S, N], k [N] and alpha [N]; a request with nothing left gets MIN_LENGTH."""
    lengths_SN = np.asarray(lengths, np.float64)
    if lengths_SN.ndim != 2 or not (np.isfinite(lengths_SN) & (lengths_SN >= 0.0)).all():
        raise DraftError(f"expected finite lengths >= 0, one a request; got shape {lengths_SN.shape}")
    num_requests = lengths_SN.shape[1]
    k_N, alpha_N = (np.asarray(x, np.float64) for x in (k, alpha))
    if any(x.shape not in ((), (num_requests,)) for x in (k_N, alpha_N)):
        raise DraftError(f"expected k and alpha scalar or [{num_requests}]; got {k_N.shape} and {alpha_N.shape}")
    if not ((k_N > 0.0) & (k_N <= 1.0)).all() or not ((alpha_N > 0.0) & np.isfinite(alpha_N)).all():
        raise DraftError(f"expected k in (0, 1] and alpha > 0; got k {k_N} and alpha {alpha_N}")
    seconds = (costs.base_s, costs.per_request_s, costs.per_draft_s)
    if not all(0.0 <= x < math.inf for x in seconds) or seconds[0] + seconds[1] <= 0.0:
        raise DraftError(f"expected costs >= 0 and time for a step, got {seconds}; observe steps before planning")
    return (
        np.maximum(lengths_SN, MIN_LENGTH),
        np.broadcast_to(k_N, num_requests),
        np.broadcast_to(alpha_N, num_requests),
    )
