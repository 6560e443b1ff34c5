"""Did an arm change the training? Identity of pairs of runs, else statistics on groups of runs.

Identity is exact: tokens, then metrics, bit for bit. Alikeness over seeds is tested on one number per run
and metric (the mean over the last half of the steps): Welch's t-test says "different", two one-sided
t-tests (TOST, Schuirmann 1987) say "equivalent" within a margin; "different" is Holm-corrected over the metrics,
and "equivalent" needs every metric, so that both keep their alpha. Nothing but "undecided" is said of runs that
`eligibility` does not let through.

Leaves out: corrections over several arms, and tests on the shape of a curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from rl_accel.compare.eligibility import TESTED, independent_pairs, obstacles
from rl_accel.compare.identity import Identity, compare_identity
from rl_accel.compare.runs import Run
from rl_accel.compare.speed import TIMED, Speed, measure_speed
from rl_accel.errors import CompareError


@dataclass(frozen=True)
class Criteria:
    """What counts as equivalent.

    Raises:
        CompareError: a margin that is negative or not finite.
    """

    score_margin: float = 0.02
    """Reward and accuracy, absolute."""
    length_margin: float = 0.05
    """Response length, as a fraction of the baseline's."""
    alpha: float = 0.05

    def __post_init__(self) -> None:
        for name, value in (("score", self.score_margin), ("length", self.length_margin)):
            if not 0 <= value < math.inf:
                raise CompareError(f"--{name}-margin must be a number from 0 on; got {value}")

    def margin(self, quantity: str, baseline_mean: float) -> float:
        """The margin in the unit of the quantity."""
        return self.length_margin * abs(baseline_mean) if quantity == "response_length" else self.score_margin


@dataclass(frozen=True)
class MetricTest:
    """Welch and TOST for one metric, one number per run."""

    quantity: str
    mean_a: float
    mean_b: float
    margin: float
    p_different: float
    """Welch, two-sided, Holm-adjusted over the metrics."""
    p_equivalent: float
    """TOST: the larger of its two one-sided p-values."""
    steps: int
    """Steps averaged in each run."""
    word: str
    """`equivalent`, `different` or `undecided`."""


@dataclass(frozen=True)
class PairedDifference:
    """Per-step differences, other arm less baseline, over paired runs."""

    quantity: str
    steps: int
    mean: float
    std: float
    largest: float
    """Of the absolute differences."""


@dataclass(frozen=True)
class Comparison:
    """One arm against the baseline."""

    baseline: str
    other: str
    paired_by: str
    """`seed`, or `order` where seeds are unknown or do not meet."""
    unpaired: int
    """Runs of either arm that have no partner: identity and speed say nothing about them."""
    word: str
    """`identical`, `equivalent`, `different` or `undecided`."""
    reason: str
    obstacles: list[str]
    """Why nothing is claimed, if `eligibility` forbids it; `reason` is the first."""
    identities: list[Identity]
    tests: list[MetricTest]
    differences: list[PairedDifference]
    speeds: list[Speed]


def compare_arms(baseline: Sequence[Run], other: Sequence[Run], criteria: Criteria) -> Comparison:
    """Judge one arm against the baseline.

    Raises:
        CompareError: no pair of their runs has a step in common.
    """
    pairs, paired_by = pair_runs(baseline, other)
    identities = [compare_identity(a, b) for a, b in pairs]
    if not any(identity.steps for identity in identities):
        raise CompareError(f"arms {baseline[0].arm!r} and {other[0].arm!r} share no step with a common metric")
    timed = independent_pairs(pairs)
    speeds = [speed for q in TIMED if (speed := measure_speed(q, timed)) is not None]
    differences = [d for q in TESTED if (d := paired_difference(q, pairs)) is not None]
    names = (baseline[0].arm, other[0].arm, paired_by, len(baseline) + len(other) - 2 * len(pairs))
    if found := obstacles(baseline, other):
        return Comparison(*names, "undecided", found[0], found, identities, [], differences, speeds)
    if all(identity.identical for identity in identities):
        return Comparison(*names, "identical", "", [], identities, [], [], speeds)
    tests = judge_metrics(baseline, other, criteria)
    word, reason = _judge(tests, len(baseline), len(other))
    return Comparison(*names, word, reason, [], identities, tests, differences, speeds)


def pair_runs(baseline: Sequence[Run], other: Sequence[Run]) -> tuple[list[tuple[Run, Run]], str]:
    """Runs of one seed meet; where seeds are unknown, repeated or disjoint, runs meet in the order given."""
    a, b = ({run.seed: run for run in runs} for runs in (baseline, other))
    known = None not in a and None not in b and len(a) == len(baseline) and len(b) == len(other)
    if known and a.keys() & b.keys():
        return [(run, b[run.seed]) for run in baseline if run.seed in b], "seed"
    return list(zip(baseline, other, strict=False)), "order"


def judge_metrics(baseline: Sequence[Run], other: Sequence[Run], criteria: Criteria) -> list[MetricTest]:
    """Welch and TOST over seeds for each metric that all runs have; empty with one run in an arm."""
    if min(len(baseline), len(other)) < 2:
        return []
    rows = []
    for quantity in TESTED:
        values, steps = last_half_means(quantity, [*baseline, *other])
        if values:
            a, b = np.array(values[: len(baseline)]), np.array(values[len(baseline) :])
            margin = criteria.margin(quantity, float(a.mean()))
            rows.append((quantity, a.mean(), b.mean(), margin, *welch_and_tost(a, b, margin), steps))
    adjusted = holm([row[4] for row in rows])
    tests = []
    for (quantity, mean_a, mean_b, margin, _, p_equivalent, steps), p_different in zip(rows, adjusted, strict=True):
        equivalent, different = p_equivalent < criteria.alpha, p_different < criteria.alpha
        word = "equivalent" if equivalent else "different" if different else "undecided"
        tests.append(MetricTest(quantity, float(mean_a), float(mean_b), margin, p_different, p_equivalent, steps, word))
    return tests


def last_half_means(quantity: str, runs: Sequence[Run]) -> tuple[list[float], int]:
    """Each run's mean over the later half of the steps that all runs have, and how many steps those are."""
    series = [run.series(quantity) for run in runs]
    common = sorted(set(series[0]).intersection(*series[1:]))
    late = common[len(common) // 2 :]
    return ([float(np.mean([s[step] for step in late])) for s in series], len(late)) if late else ([], 0)


def welch_and_tost(a: np.ndarray, b: np.ndarray, margin: float) -> tuple[float, float]:
    """p-values of "the means differ" (Welch, two-sided) and of "they differ by less than the margin" (TOST).

    Args:
        a: [seeds of the baseline], at least 2
        b: [seeds of the other arm], at least 2
        margin: in the unit of the values
    """
    scale = max(abs(a).max(), abs(b).max()) or 1.0  # no square under- or overflows
    a, b, margin = a / scale, b / scale, margin / scale
    difference = float(b.mean() - a.mean())
    variances = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    error = math.sqrt(sum(variances))
    if error < 1e-12:
        return float(difference == 0.0), float(abs(difference) >= margin)
    df = sum(variances) ** 2 / (variances[0] ** 2 / (len(a) - 1) + variances[1] ** 2 / (len(b) - 1))
    t = stats.t(df)
    p_equivalent = max(t.sf((difference + margin) / error), t.cdf((difference - margin) / error))
    return float(2 * t.sf(abs(difference) / error)), float(p_equivalent)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: rejecting adjusted p < alpha keeps the family-wise error at alpha."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def paired_difference(quantity: str, pairs: Sequence[tuple[Run, Run]]) -> PairedDifference | None:
    """Other arm less baseline at every common step of every pair."""
    series = [(a.series(quantity), b.series(quantity)) for a, b in pairs]
    values = np.array([b[step] - a[step] for a, b in series for step in a if step in b])
    if not len(values):
        return None
    std = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return PairedDifference(quantity, len(values), float(values.mean()), std, float(abs(values).max()))


def _judge(tests: Sequence[MetricTest], seeds_a: int, seeds_b: int) -> tuple[str, str]:
    if min(seeds_a, seeds_b) < 2:
        return "undecided", "one seed per arm" if seeds_a == seeds_b else "one seed in an arm"
    if not tests:
        return "undecided", "no reward, accuracy or response length that all runs have"
    named = {word: _named(tests, word) for word in ("different", "undecided", "equivalent")}
    if named["different"]:
        return "different", named["different"]
    if named["undecided"]:
        return "undecided", f"too few seeds or too wide a spread for {named['undecided']}"
    return "equivalent", f"within the margin: {named['equivalent']}"


def _named(tests: Sequence[MetricTest], word: str) -> str:
    return ", ".join(test.quantity.replace("_", " ") for test in tests if test.word == word)
