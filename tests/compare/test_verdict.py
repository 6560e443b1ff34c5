"""The verdicts: identity, and tests over seeds with their error rates."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from rl_accel.compare.identity import compare_identity
from rl_accel.compare.report import describe_identity, sentence
from rl_accel.compare.runs import Run
from rl_accel.compare.tokens import save_tokens
from rl_accel.compare.verdict import (
    Criteria,
    compare_arms,
    holm,
    judge_metrics,
    last_half_means,
    pair_runs,
    welch_and_tost,
)
from rl_accel.errors import CompareError

REWARD, LENGTH, GEN = "critic/score/mean", "response_length/mean", "timing_s/gen"
CRITERIA = Criteria()


def run(arm="a", seed=0, tokens=None, **metrics) -> Run:
    named = {"reward": REWARD, "length": LENGTH, "gen": GEN, "step": "timing_s/step"}
    columns = {named.get(key, key): dict(enumerate(map(float, values), start=1)) for key, values in metrics.items()}
    return Run(f"{arm}-{seed}", f"{arm}-seed{seed}", arm, seed, columns, tokens, finished=True)


def seeds(arm, offset, spread, count, generator, length=200.0, steps=20) -> list[Run]:
    """Runs whose level is offset + spread * N(0, 1), around a common curve with step noise."""
    runs = []
    for seed in range(count):
        level = 0.5 + offset + spread * generator.standard_normal()
        reward = level + 0.01 * generator.standard_normal(steps)
        lengths = length * (1 + spread * generator.standard_normal()) + generator.standard_normal(steps)
        runs.append(run(arm, seed, reward=reward, length=lengths))
    return runs


def test_identical_metrics_without_tokens_say_so():
    clip = {"actor/pg_clipfrac": [0.1, 0.2, math.nan]}
    a = run("a", reward=[0.1, 0.2, 0.3], gen=[3, 2, 1], **clip)
    b = run("b", reward=[0.1, 0.2, 0.3], gen=[1, 1, 1], **clip, **{"rollout/spec_accept_length": [1, 2, 3]})
    result = compare_arms([a], [b], CRITERIA)
    assert result.word == "identical"
    assert (result.identities[0].basis, result.identities[0].last_identical_step) == ("metrics", 3)
    assert "no tokens to compare" in sentence(result)


def test_first_metric_that_differs_is_named_to_the_last_bit():
    pg_loss = [0.5, 0.25, 0.125]
    changed = [0.5, math.nextafter(0.25, 1), 0.0]
    a = run("a", reward=[0.1, 0.2, 0.3], **{"actor/pg_loss": pg_loss, "actor/grad_norm": [1, 1, 1]})
    b = run("b", reward=[0.1, 0.2, 0.0], **{"actor/pg_loss": changed, "actor/grad_norm": [1, 1, 2]})
    identity = compare_identity(a, b)
    metric = identity.metric
    assert (metric.metric, metric.step, metric.value_a, metric.value_b) == (
        "actor/pg_loss",
        2,
        0.25,
        changed[1],
    )
    assert (identity.identical, identity.last_identical_step) == (False, 1)


@pytest.mark.parametrize(
    "name",
    [
        "timing_s/step",
        "rollout_corr/k3_kl",
        "training/rollout_probs_diff_max",
        "timing_per_token_ms/gen",
        "perf/mfu",
        "rollout/spec_accept_rate",
        "rollout/slowest_request_s",
    ],
)
def test_metrics_of_time_and_drafting_may_differ(name):
    a, b = (run(arm, reward=[0.1, 0.2], **{name: values}) for arm, values in (("a", [1, 2]), ("b", [3, 4])))
    assert compare_identity(a, b).identical


def test_equal_tokens_with_another_loss_are_not_identical(tmp_path):
    for side in "ab":
        save_tokens(tmp_path / side / "1.npz", ["p"], [0], [3], [[1, 2]])
        save_tokens(tmp_path / side / "2.npz", ["p"], [0], [3], [[3, 4]])
    a, b = (run(s, tokens=tmp_path / s, reward=[0.1, 0.2], loss=[1, loss]) for s, loss in (("a", 1), ("b", 2)))
    result = compare_arms([a], [b], CRITERIA)
    assert (result.word, result.reason) == ("undecided", "one seed per arm")
    text = describe_identity(result.identities[0])
    assert "`loss` at step 2: 1.0 became 2.0, with equal tokens" in text
    save_tokens(tmp_path / "b" / "2.npz", ["p"], [0], [3], [[3, 5]])
    text = describe_identity(compare_identity(a, b))
    assert "step 2, problem p, sample 0, token 1 of the response: 4 became 5 (1 of 1 rows" in text


def test_one_seed_shows_paired_differences_but_no_verdict():
    result = compare_arms([run("a", reward=[1, 2, 3])], [run("b", reward=[1, 2, 6])], CRITERIA)
    assert (result.word, result.reason, result.tests) == ("undecided", "one seed per arm", [])
    (difference,) = result.differences
    assert (difference.quantity, difference.steps, difference.mean, difference.largest) == ("reward", 3, 1, 3)


def test_runs_that_share_no_step_cannot_be_compared():
    a, b = run("a", reward=[1]), Run("b", "b", "b", 0, {REWARD: {9: 1.0}})
    with pytest.raises(CompareError, match="share no step"):
        compare_arms([a], [b], CRITERIA)


def test_pairs_by_seed_else_by_order():
    a = [run("a", seed) for seed in (0, 1, 2)]
    pairs, by = pair_runs(a, [run("b", 2), run("b", 1)])
    assert ([(x.seed, y.seed) for x, y in pairs], by) == ([(1, 1), (2, 2)], "seed")
    for other in ([run("b", 7), run("b", 8)], [run("b", None), run("b", 1)], [run("b", 1), run("b", 1)]):
        pairs, by = pair_runs(a, other)
        assert ([x.seed for x, _ in pairs], by) == ([0, 1], "order")


@pytest.mark.parametrize(
    ("offset", "spread", "word"),
    [(0.0, 0.003, "equivalent"), (0.15, 0.01, "different"), (0.0, 0.15, "undecided")],
)
def test_verdict_over_seeds(offset, spread, word):
    generator = np.random.default_rng(5)
    baseline, other = seeds("a", 0, spread, 4, generator), seeds("b", offset, spread, 4, generator)
    result = compare_arms(baseline, other, CRITERIA)
    assert result.word == word
    assert [test.quantity for test in result.tests] == ["reward", "response_length"]
    assert result.tests[0].steps == 10


def test_margins_are_settings_and_length_is_relative():
    generator = np.random.default_rng(6)
    baseline, other = (seeds(arm, 0, 0.01, 4, generator) for arm in "ab")
    wide = judge_metrics(baseline, other, Criteria(score_margin=0.1, length_margin=0.1))
    narrow = judge_metrics(baseline, other, Criteria(score_margin=1e-4, length_margin=1e-4))
    assert [test.word for test in wide] == ["equivalent", "equivalent"]
    assert "equivalent" not in [test.word for test in narrow]
    assert wide[1].margin == pytest.approx(0.1 * wide[1].mean_a)


def test_last_half_uses_common_steps_only():
    short, long = run("a", reward=[0, 0, 4, 6]), run("b", reward=[0, 0, 2, 2, 100, 100])
    assert last_half_means("reward", [short, long]) == ([5.0, 2.0], 2)
    assert last_half_means("accuracy", [short, long]) == ([], 0)


def test_welch_and_tost_against_scipy():
    generator = np.random.default_rng(7)
    for size_a, size_b in ((2, 2), (3, 5), (8, 4)):
        a, b = generator.normal(0, 1, size_a), generator.normal(0.3, 2, size_b)
        p_different, p_equivalent = welch_and_tost(a, b, 1.5)
        assert p_different == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue, rel=1e-9)
        sides = (
            stats.ttest_ind(b + 1.5, a, equal_var=False, alternative="greater").pvalue,
            stats.ttest_ind(b - 1.5, a, equal_var=False, alternative="less").pvalue,
        )
        assert p_equivalent == pytest.approx(max(sides), rel=1e-9)
    same = np.array([0.5, 0.5])
    assert welch_and_tost(same, same, 0.02) == (1.0, 0.0)
    assert welch_and_tost(same, same + 0.1, 0.02) == (0.0, 1.0)


@pytest.mark.parametrize("scale", [1e-300, 1e-90, 1e90])
def test_values_of_any_size_are_tested_alike(scale):
    generator = np.random.default_rng(11)
    a, b = generator.normal(1, 0.1, 3), generator.normal(1.3, 0.1, 3)
    assert welch_and_tost(a * scale, b * scale, 0.2 * scale) == pytest.approx(welch_and_tost(a, b, 0.2), rel=1e-9)


@pytest.mark.parametrize("margin", [math.nan, math.inf, -0.1])
def test_margins_that_would_pass_everything_are_refused(margin):
    with pytest.raises(CompareError, match="--score-margin"):
        Criteria(score_margin=margin)
    with pytest.raises(CompareError, match="--length-margin"):
        Criteria(length_margin=margin)


def test_holm_against_its_definition():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_error_rates_of_the_verdicts():
    """400 simulations each, 3 seeds an arm, two metrics, nominal 5 %. A true rate of 5 % exceeds the bound of
    8 % by luck with probability 0.4 %; a rate of 12 % passes it with probability 0.6 %.
    """
    generator = np.random.default_rng(8)
    bound, trials = 0.08 * 400, 400
    false_different = false_equivalent = 0
    for _ in range(trials):
        baseline = seeds("a", 0, 0.02, 3, generator, steps=6)
        same, apart = (seeds("b", offset, 0.02, 3, generator, steps=6) for offset in (0.0, 0.02))
        false_different += any(test.word == "different" for test in judge_metrics(baseline, same, CRITERIA))
        false_equivalent += all(test.word == "equivalent" for test in judge_metrics(baseline, apart, CRITERIA))
    assert false_different <= bound
    assert false_equivalent <= bound


def test_power_of_the_verdicts():
    """A tool that always says undecided would pass the error rates: with clear cases it must decide."""
    generator = np.random.default_rng(9)
    different = equivalent = 0
    for _ in range(100):
        baseline = seeds("a", 0, 0.004, 4, generator, steps=6)
        apart, same = (seeds("b", offset, 0.004, 4, generator, steps=6) for offset in (0.1, 0.0))
        different += compare_arms(baseline, apart, CRITERIA).word == "different"
        equivalent += compare_arms(baseline, same, CRITERIA).word == "equivalent"
    assert different >= 85
    assert equivalent >= 85
