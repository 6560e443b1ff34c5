"""The losslessness statistics: p-values against scipy, false alarms at their nominal rate, and deviations found."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rl_accel import lossless


@settings(max_examples=200, deadline=None)
@given(statistic=st.floats(0, 2000), dof=st.integers(1, 600))
def test_p_value_equals_scipy(statistic, dof):
    want = stats.chi2.sf(statistic, dof)
    assert math.isclose(lossless.chi_square_p_value(statistic, dof), want, rel_tol=1e-6, abs_tol=1e-200)


def test_statistic_equals_scipy_without_pooling():
    counts = torch.tensor([30, 14, 34, 45, 57, 20])
    target = torch.full((6,), 1 / 6)
    want = stats.chisquare(counts.numpy())
    got = lossless.chi_square(counts, target)
    assert got.dof == 5
    assert math.isclose(got.statistic, want.statistic) and math.isclose(got.p_value, want.pvalue, rel_tol=1e-6)


def test_rare_outcomes_are_pooled():
    target = torch.tensor([0.5, 0.49, 0.004, 0.003, 0.003], dtype=torch.float64)
    result = lossless.chi_square(torch.tensor([500, 490, 4, 3, 3]), target)
    assert result.dof == 2 and result.statistic < 1e-9
    few = lossless.chi_square(torch.tensor([50, 49, 1, 0, 0]), target)
    assert few.dof == 1, "the pooled bin is expected once in 100, so it takes the next outcome in"


def test_pooling_keeps_every_observation():
    generator = torch.Generator().manual_seed(0)
    for size in range(1, 40):
        target = torch.rand(size, generator=generator).double() ** 6 + 1e-9
        expected = target / target.sum() * 60
        observed = torch.randint(0, 9, (size,), generator=generator).double()
        pooled_observed, pooled_expected = lossless._pool(observed, expected)
        torch.testing.assert_close(pooled_observed.sum(), observed.sum())
        torch.testing.assert_close(pooled_expected.sum(), expected.sum())
        assert len(pooled_expected) == 1 or float(pooled_expected.min()) >= lossless.MIN_EXPECTED


def test_false_alarms_come_at_the_nominal_rate():
    """2,000 right samplers at alpha 0.05: 100 alarms expected; 60 to 140 holds with probability 0.9999."""
    target = np.array([0.4, 0.3, 0.15, 0.1, 0.04, 0.009, 0.001])
    draws = np.random.default_rng(0).multinomial(1000, target, size=2000)
    alarms = sum(
        not lossless.chi_square(torch.from_numpy(row), torch.from_numpy(target), alpha=0.05).passed for row in draws
    )
    assert 60 <= alarms <= 140


def test_a_shifted_sampler_is_found():
    """20,000 samples at total variation 0.03 from the target: chi-square is about 80 on 7 degrees of freedom."""
    target = torch.full((8,), 1 / 8)
    shifted = target.clone()
    shifted[0] += 0.03
    shifted[1] -= 0.03
    counts = (shifted * 20_000).round().long()
    result = lossless.chi_square(counts, target)
    assert not result.passed and result.p_value < 1e-9
    assert math.isclose(lossless.total_variation(counts, target), 0.03, abs_tol=1e-3)


def test_impossible_outcomes_fail_however_rare():
    result = lossless.chi_square(torch.tensor([1_000_000, 1]), torch.tensor([1.0, 0.0]))
    assert not result.passed and result.p_value == 0.0 and result.statistic == math.inf


def test_nothing_to_test():
    result = lossless.chi_square(torch.tensor([5, 0]), torch.tensor([1.0, 0.0]))
    assert result.passed and result.p_value == 1.0 and result.dof == 0


def test_total_variation_bounds():
    target = torch.tensor([0.25, 0.75, 0.0])
    assert lossless.total_variation(torch.tensor([1, 3, 0]), target) == 0.0
    assert lossless.total_variation(torch.tensor([0, 0, 9]), target) == 1.0


def test_count_tokens():
    assert lossless.count_tokens(torch.tensor([[0, 2], [2, 1]]), 4).tolist() == [1, 1, 2, 0]
    with pytest.raises(ValueError, match="expected ids in"):
        lossless.count_tokens(torch.tensor([0, -1]), 4)


@pytest.mark.parametrize(
    ("counts", "target", "message"),
    [
        (torch.tensor([1, 2]), torch.tensor([1.0]), "one shape"),
        (torch.tensor([0, 0]), torch.tensor([0.5, 0.5]), "at least one observation"),
        (torch.tensor([1, 2]), torch.tensor([1.5, -0.5]), "non-negative"),
        (torch.tensor([1, 2]), torch.tensor([0.0, 0.0]), "positive sum"),
        (torch.tensor([1, 2]), torch.tensor([float("nan"), 1.0]), "non-negative"),
    ],
)
def test_wrong_arguments(counts, target, message):
    with pytest.raises(ValueError, match=message):
        lossless.chi_square(counts, target)
