"""Is an arm faster? Ratios of the seconds of paired steps, judged on one number per pair of runs.

Steps of one run share the state of the machine it met, so that they say nothing about the next run: a pair counts
once, by the median of its steps, and the interval is Student's t over pairs. One pair claims nothing.

Each of the two timings is judged at 2.5 %, so that equal arms are told apart in 5 % of comparisons at most, by either.
Leaves out: a correction over several arms; and drift of the machine that falls on one arm in all pairs (interleave
the runs).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from rl_accel.compare.runs import Run

TIMED = ("rollout_s", "step_s")
WARMUP_STEPS = 2
"""First steps that no timing counts: compilation, caches, an empty draft index."""
CLOCK_S = 1e-9
"""A time shorter than a tick of the clock is no measurement."""
ALPHA = 0.05 / len(TIMED)
"""Of one timing."""


@dataclass(frozen=True)
class Speed:
    """Baseline seconds over the other arm's, step by step: more than 1 means that the other arm is faster."""

    quantity: str
    ratio: float
    """Geometric mean over pairs of their median ratio."""
    quartiles: tuple[float, float]
    """Over the steps of all pairs."""
    interval: tuple[float, float] | None
    """97.5 %, Student's t over pairs; None for one pair."""
    pairs: int
    steps: int
    word: str
    """`faster`, `slower`, `no difference measured` or `one pair of runs`."""


def measure_speed(quantity: str, pairs: Sequence[tuple[Run, Run]]) -> Speed | None:
    """Ratio of baseline seconds to other seconds over independent pairs, after `WARMUP_STEPS` common steps of each.

    Returns:
        None if no pair has a timed step after its warm-up.
    """
    logs = []
    for a, b in ((a.series(quantity), b.series(quantity)) for a, b in pairs):
        steps = [step for step in a if step in b and min(a[step], b[step]) > CLOCK_S][WARMUP_STEPS:]
        if steps:
            logs.append(np.log([a[step] for step in steps]) - np.log([b[step] for step in steps]))
    if not logs:
        return None
    q1, q3 = np.exp(np.quantile(np.concatenate(logs), [0.25, 0.75]))
    medians = np.array([np.median(log) for log in logs])
    center, n = float(medians.mean()), len(medians)
    interval, word = None, "one pair of runs"
    if n > 1:
        margin = float(stats.t.ppf(1 - ALPHA / 2, n - 1) * medians.std(ddof=1) / math.sqrt(n))
        with np.errstate(over="ignore"):  # two pairs that differ wildly: the interval reaches infinity
            low, high = np.exp([center - margin, center + margin])
        interval = (float(low), float(high))
        word = "no difference measured" if abs(center) <= margin else "faster" if center > 0 else "slower"
    steps_used = sum(len(log) for log in logs)
    return Speed(quantity, math.exp(center), (float(q1), float(q3)), interval, n, steps_used, word)
