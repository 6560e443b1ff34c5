"""Speed: what is paired, and how often a difference is claimed where there is none, or is one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.signal import lfilter

from rl_accel.compare.report import sentence
from rl_accel.compare.runs import Run
from rl_accel.compare.speed import measure_speed
from rl_accel.compare.verdict import Criteria, compare_arms

GEN = "timing_s/gen"
BETWEEN_RUNS, BETWEEN_STEPS, CARRIED_OVER = 0.02, 0.05, 0.7


def timed(generator, steps: int = 32, speed: float = 1.0, warm_up: float = 1.0, seed: int = 0, arm: str = "x") -> Run:
    """A run whose level is off by 2 %, and whose steps are off by 5 %, of which 70 % lasts to the next step."""
    noise = generator.standard_normal(steps) * math.sqrt(1 - CARRIED_OVER**2)
    lasting = lfilter([1], [1, -CARRIED_OVER], noise)
    seconds = 10 / speed * np.exp(BETWEEN_RUNS * generator.standard_normal() + BETWEEN_STEPS * lasting)
    seconds[:2] *= warm_up
    columns = {
        GEN: dict(enumerate(seconds.tolist(), start=1)),
        "critic/score/mean": dict.fromkeys(range(1, steps), seed),
    }
    return Run(f"{arm}-{seed}", f"{arm}-{seed}", arm, seed, columns, finished=True)


def words(generator, comparisons: int, pairs: int, speed: float) -> list[str]:
    return [
        measure_speed("rollout_s", [(timed(generator), timed(generator, speed=speed)) for _ in range(pairs)]).word
        for _ in range(comparisons)
    ]


@pytest.mark.parametrize(("speed", "word"), [(1.5, "faster"), (0.7, "slower"), (1.0, "no difference measured")])
def test_speed_ratio(speed, word):
    generator = np.random.default_rng(10)
    pairs = [(timed(generator, 30), timed(generator, 30, speed, warm_up=50)) for _ in range(3)]
    result = measure_speed("rollout_s", pairs)
    assert (result.word, result.pairs, result.steps) == (word, 3, 3 * 28)
    assert result.ratio == pytest.approx(speed, rel=0.06)
    assert result.interval[0] <= result.ratio <= result.interval[1]


def test_the_interval_is_students_t_over_the_pairs():
    def steady(seconds: float) -> Run:
        return Run("a", "a", "a", 0, {GEN: dict.fromkeys(range(1, 9), seconds)})

    logs = np.array([0.1, 0.2, 0.4])
    result = measure_speed("rollout_s", [(steady(math.exp(log)), steady(1.0)) for log in logs])
    margin = 6.205346817 * logs.std(ddof=1) / math.sqrt(3)  # t, 2 degrees of freedom, 98.75 %
    expected = np.exp([logs.mean() - margin, logs.mean() + margin])
    assert result.interval == pytest.approx(expected, rel=1e-8)
    assert (result.ratio, result.word) == (pytest.approx(math.exp(logs.mean())), "no difference measured")


def test_speed_pairs_steps_and_drops_warm_up():
    a = Run("a", "a", "a", 0, {GEN: {1: 99.0, 2: 99.0, 3: 4.0, 4: 8.0, 7: 2.0}})
    b = Run("b", "b", "b", 0, {GEN: {1: 1.0, 2: 1.0, 3: 2.0, 4: 4.0, 6: 1.0, 7: 1.0}})
    result = measure_speed("rollout_s", [(a, b)])
    assert (result.ratio, *result.quartiles, result.steps) == pytest.approx((2.0, 2.0, 2.0, 3))
    assert measure_speed("step_s", [(a, b)]) is None


def test_one_pair_claims_nothing_however_fast_it_was():
    generator = np.random.default_rng(12)
    result = compare_arms([timed(generator, arm="a")], [timed(generator, speed=3, arm="b")], Criteria())
    (speed,) = result.speeds
    assert (speed.word, speed.interval, speed.pairs) == ("one pair of runs", None, 1)
    assert f"rollout ratio {speed.ratio:.2f} in one pair of runs, no claim" in sentence(result)


def test_copies_of_a_pair_are_one_pair():
    """They would agree to the last bit: an interval of no width, and a claim whatever the ratio."""
    generator = np.random.default_rng(13)
    a, b = timed(generator, arm="a"), timed(generator, arm="b")
    again = [Run(f"{run.name}-copy", "copy", run.arm, 1, run.metrics, finished=True) for run in (a, b)]
    (speed,) = compare_arms([a, again[0]], [b, again[1]], Criteria()).speeds
    assert (speed.pairs, speed.word) == (1, "one pair of runs")


@pytest.mark.parametrize("pairs", [2, 3, 5])
def test_false_claims_of_speed(pairs):
    """600 null comparisons of one timing, alpha 2.5 %: more than 28 happen by luck with probability 0.1 %. An interval
    over steps claims a difference in 24, 14 and 10 % of them.
    """
    found = words(np.random.default_rng(pairs), 600, pairs, speed=1.0)
    assert len([word for word in found if word != "no difference measured"]) <= 28


@pytest.mark.parametrize(("pairs", "power"), [(3, 0.19), (5, 0.75)])
def test_ten_percent_are_found(pairs, power):
    """True power 34 % and 87 %: 100 comparisons fall below the bounds with probability 0.1 %."""
    found = words(np.random.default_rng(20 + pairs), 100, pairs, speed=1.1)
    assert found.count("faster") >= 100 * power
