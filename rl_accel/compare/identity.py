"""Did two runs train the same, bit for bit? Tokens first, then metrics; the first difference is named.

Leaves out metrics of time, of drafting, and of the engine's log-probs, whose last bits follow the shape of its
batches: they differ between runs that train identically.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from rl_accel.compare.runs import Run
from rl_accel.compare.tokens import Divergence, compare_tokens

_MAY_DIFFER = re.compile(
    r"^(timing|perf/|rollout/spec_|rl_accel/|rollout_corr/|training/rollout_)|/perf/|_(m?s|seconds)$"
)


@dataclass(frozen=True)
class MetricDivergence:
    """The first metric at which two runs differ."""

    metric: str
    step: int
    value_a: float
    value_b: float


@dataclass(frozen=True)
class Identity:
    """Whether two runs trained the same, bit for bit, over their common steps."""

    run_a: str
    run_b: str
    basis: str
    """`tokens` (and metrics) or `metrics` (a side has no token files, or they share no step)."""
    steps: int
    """Common steps compared."""
    last_identical_step: int | None
    divergence: Divergence | None
    metric: MetricDivergence | None

    @property
    def identical(self) -> bool:
        """No difference, in at least one step."""
        return self.steps > 0 and self.divergence is None and self.metric is None


def may_differ(metric: str) -> bool:
    """Whether a metric may differ between runs that train identically."""
    return _MAY_DIFFER.search(metric) is not None


def compare_identity(a: Run, b: Run) -> Identity:
    """Tokens first; if they agree, or there are none, every metric that may not differ."""
    tokens = compare_tokens(a.tokens_dir, b.tokens_dir)
    metric, metric_steps = first_metric_divergence(a, b)
    if tokens.divergence is not None:
        last = tokens.last_identical_step
        return Identity(a.name, b.name, "tokens", len(tokens.steps), last, tokens.divergence, None)
    basis, steps = ("tokens", list(tokens.steps)) if tokens.steps else ("metrics", metric_steps)
    before = [step for step in steps if metric is None or step < metric.step]
    return Identity(a.name, b.name, basis, len(steps), max(before, default=None), None, metric)


def first_metric_divergence(a: Run, b: Run) -> tuple[MetricDivergence | None, list[int]]:
    """The first value (by step, then name) of a common metric that is not bit-equal, and the common steps."""
    first: MetricDivergence | None = None
    steps: set[int] = set()
    for name in sorted(a.metrics.keys() & b.metrics.keys()):
        if may_differ(name):
            continue
        shared = a.metrics[name].keys() & b.metrics[name].keys()
        steps |= shared
        for step in shared if first is None else [s for s in shared if s < first.step]:
            x, y = a.metrics[name][step], b.metrics[name][step]
            if x != y and not (math.isnan(x) and math.isnan(y)) and (first is None or step < first.step):
                first = MetricDivergence(name, step, x, y)
    return first, sorted(steps)
