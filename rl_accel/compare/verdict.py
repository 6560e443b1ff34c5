"""Did an arm change the training, and is it faster? Statistics on pairs and groups of runs.

Identity is exact: tokens, then metrics, bit for bit. Alikeness over seeds is tested on one number per run
and metric (the mean over the last half of the common steps): Welch's t-test says "different", two one-sided
t-tests (TOST, Schuirmann 1987) say "alike" within a margin; "different" is Holm-corrected over the metrics,
and "alike" needs every metric, so that both keep their alpha. Speed is the median of per-step time ratios
with a bootstrap interval.

Leaves out: corrections over several arms, the autocorrelation of step times (a slow phase of the machine
that falls on one arm looks like a slower arm: interleave the runs), and tests on the shape of a curve.
Costs about a second.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from rl_accel.compare.runs import Run
from rl_accel.compare.tokens import Parting, compare_tokens
from rl_accel.errors import CompareError

TESTED = ("reward", "accuracy", "response_length")
TIMED = ("rollout_s", "step_s")
WARMUP_STEPS = 2
"""First steps that no timing counts: compilation, caches, an empty draft index."""
MIN_TIMED_STEPS = 6
"""Fewer paired steps claim nothing: five fall on one side of 1 by luck in 6 % of null comparisons."""
BOOTSTRAP_RESAMPLES = 4000

_MAY_DIFFER = re.compile(
    r"^(timing|perf/|rollout/spec_|rl_accel/|rollout_corr/|training/rollout_)|/perf/|_(m?s|seconds)$"
)
"""Metrics of time, of drafting, and of the engine's log-probs, whose last bits follow the shape of its batches: they
differ between runs that train identically."""


@dataclass(frozen=True)
class Criteria:
    """What counts as alike."""

    score_margin: float = 0.02
    """Reward and accuracy, absolute."""
    length_margin: float = 0.05
    """Response length, as a fraction of the baseline's."""
    alpha: float = 0.05

    def margin(self, quantity: str, baseline_mean: float) -> float:
        """The margin in the unit of the quantity."""
        return self.length_margin * abs(baseline_mean) if quantity == "response_length" else self.score_margin


@dataclass(frozen=True)
class MetricParting:
    """The first metric at which two runs differ."""

    metric: str
    step: int
    value_a: float
    value_b: float


@dataclass(frozen=True)
class Identity:
    """Whether two runs trained bit for bit alike over their common steps."""

    run_a: str
    run_b: str
    basis: str
    """`tokens` (and metrics) or `metrics` (a side has no token files, or they share no step)."""
    steps: int
    """Common steps compared."""
    last_identical_step: int | None
    parting: Parting | None
    metric: MetricParting | None

    @property
    def identical(self) -> bool:
        """No difference, in at least one step."""
        return self.steps > 0 and self.parting is None and self.metric is None


@dataclass(frozen=True)
class MetricTest:
    """Welch and TOST for one metric, one number per run."""

    quantity: str
    mean_a: float
    mean_b: float
    margin: float
    p_different: float
    """Welch, two-sided, Holm-adjusted over the metrics."""
    p_alike: float
    """TOST: the larger of its two one-sided p-values."""
    steps: int
    """Steps averaged in each run."""
    word: str
    """`alike`, `different` or `undecided`."""


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
class Speed:
    """Baseline seconds over the other arm's, step by step: more than 1 means that the other arm is faster."""

    quantity: str
    ratio: float
    """Median."""
    quartiles: tuple[float, float]
    interval: tuple[float, float]
    """95 %, bootstrap over paired runs and steps."""
    steps: int
    word: str
    """`faster`, `slower` or `no difference measured`."""


@dataclass(frozen=True)
class Comparison:
    """One arm against the baseline."""

    baseline: str
    other: str
    paired_by: str
    """`seed`, or `order` where seeds are unknown or do not meet."""
    word: str
    """`identical`, `alike`, `different` or `undecided`."""
    reason: str
    identities: list[Identity]
    tests: list[MetricTest] = field(default_factory=list)
    differences: list[PairedDifference] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)


def compare_arms(baseline: Sequence[Run], other: Sequence[Run], criteria: Criteria) -> Comparison:
    """Judge one arm against the baseline.

    Raises:
        CompareError: no pair of their runs has a step in common.
    """
    pairs, paired_by = pair_runs(baseline, other)
    identities = [compare_identity(a, b) for a, b in pairs]
    if not any(identity.steps for identity in identities):
        raise CompareError(f"arms {baseline[0].arm!r} and {other[0].arm!r} share no step with a common metric")
    speeds = [speed for q in TIMED if (speed := measure_speed(q, pairs)) is not None]
    names = (baseline[0].arm, other[0].arm, paired_by)
    if all(identity.identical for identity in identities):
        return Comparison(*names, "identical", "", identities, speeds=speeds)
    differences = [d for q in TESTED if (d := paired_difference(q, pairs)) is not None]
    tests = judge_metrics(baseline, other, criteria)
    word, reason = _judge(tests, len(baseline), len(other))
    return Comparison(*names, word, reason, identities, tests, differences, speeds)


def pair_runs(baseline: Sequence[Run], other: Sequence[Run]) -> tuple[list[tuple[Run, Run]], str]:
    """Runs of one seed meet; where seeds are unknown, repeated or disjoint, runs meet in the order given."""
    a, b = ({run.seed: run for run in runs} for runs in (baseline, other))
    known = None not in a and None not in b and len(a) == len(baseline) and len(b) == len(other)
    if known and a.keys() & b.keys():
        return [(run, b[run.seed]) for run in baseline if run.seed in b], "seed"
    return list(zip(baseline, other, strict=False)), "order"


def compare_identity(a: Run, b: Run) -> Identity:
    """Tokens first; if they agree, or there are none, every metric that measures no time or drafting."""
    tokens = compare_tokens(a.tokens_dir, b.tokens_dir)
    metric, metric_steps = first_metric_parting(a, b)
    if tokens.parting is not None:
        last = tokens.last_identical_step
        return Identity(a.name, b.name, "tokens", len(tokens.steps), last, tokens.parting, None)
    basis, steps = ("tokens", list(tokens.steps)) if tokens.steps else ("metrics", metric_steps)
    before = [step for step in steps if metric is None or step < metric.step]
    return Identity(a.name, b.name, basis, len(steps), max(before, default=None), None, metric)


def first_metric_parting(a: Run, b: Run) -> tuple[MetricParting | None, list[int]]:
    """The first value (by step, then name) of a common metric that is not bit-equal, and the common steps."""
    first: MetricParting | None = None
    steps: set[int] = set()
    for name in sorted(a.metrics.keys() & b.metrics.keys()):
        if _MAY_DIFFER.search(name):
            continue
        shared = a.metrics[name].keys() & b.metrics[name].keys()
        steps |= shared
        for step in shared if first is None else [s for s in shared if s < first.step]:
            x, y = a.metrics[name][step], b.metrics[name][step]
            if x != y and not (math.isnan(x) and math.isnan(y)) and (first is None or step < first.step):
                first = MetricParting(name, step, x, y)
    return first, sorted(steps)


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
    for (quantity, mean_a, mean_b, margin, _, p_alike, steps), p_different in zip(rows, adjusted, strict=True):
        alike, different = p_alike < criteria.alpha, p_different < criteria.alpha
        word = "alike" if alike else "different" if different else "undecided"
        tests.append(MetricTest(quantity, float(mean_a), float(mean_b), margin, p_different, p_alike, steps, word))
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
    difference = float(b.mean() - a.mean())
    variances = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    error = math.sqrt(sum(variances))
    if error < 1e-12 * max(abs(a).max(), abs(b).max(), 1e-300):
        return float(difference == 0.0), float(abs(difference) >= margin)
    df = sum(variances) ** 2 / (variances[0] ** 2 / (len(a) - 1) + variances[1] ** 2 / (len(b) - 1))
    t = stats.t(df)
    p_alike = max(t.sf((difference + margin) / error), t.cdf((difference - margin) / error))
    return float(2 * t.sf(abs(difference) / error)), float(p_alike)


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


def measure_speed(quantity: str, pairs: Sequence[tuple[Run, Run]]) -> Speed | None:
    """Median over paired steps of baseline seconds / other seconds, after `WARMUP_STEPS` common steps.

    The bootstrap resamples pairs, then steps within each, so that runs that disagree widen the interval;
    its percentiles are expanded for small samples (Hesterberg 2015, "What Teachers Should Know About the
    Bootstrap"). With one pair the interval knows the noise between steps only.
    """
    ratios = []
    for a, b in ((a.series(quantity), b.series(quantity)) for a, b in pairs):
        steps = [step for step in a if step in b and a[step] > 0 and b[step] > 0][WARMUP_STEPS:]
        if steps:
            ratios.append(np.array([a[step] / b[step] for step in steps]))
    if not ratios:
        return None
    pooled = np.concatenate(ratios)
    generator = np.random.default_rng(0)
    medians = np.empty(BOOTSTRAP_RESAMPLES)
    for i in range(BOOTSTRAP_RESAMPLES):
        drawn = (ratios[j] for j in generator.integers(len(ratios), size=len(ratios)))
        medians[i] = np.median(np.concatenate([r[generator.integers(len(r), size=len(r))] for r in drawn]))
    n = len(pooled)
    tail = stats.norm.cdf(math.sqrt(n / (n - 1)) * stats.t.ppf(0.025, n - 1)) if n > 1 else 0.0
    low, high = np.quantile(medians, [tail, 1 - tail])
    word = "no difference measured"
    if n >= MIN_TIMED_STEPS and not low <= 1 <= high:
        word = "faster" if low > 1 else "slower"
    q1, median, q3 = np.quantile(pooled, [0.25, 0.5, 0.75])
    return Speed(quantity, float(median), (float(q1), float(q3)), (float(low), float(high)), n, word)


def _judge(tests: Sequence[MetricTest], seeds_a: int, seeds_b: int) -> tuple[str, str]:
    if min(seeds_a, seeds_b) < 2:
        return "undecided", "one seed per arm" if seeds_a == seeds_b else "one seed in an arm"
    if not tests:
        return "undecided", "no reward, accuracy or response length that all runs have"
    by_word = {word: [t.quantity for t in tests if t.word == word] for word in ("different", "undecided")}
    if by_word["different"]:
        return "different", ", ".join(by_word["different"])
    if by_word["undecided"]:
        return "undecided", "too few seeds or too wide a spread for " + ", ".join(by_word["undecided"])
    return "alike", "within the margin: " + ", ".join(t.quantity for t in tests)
