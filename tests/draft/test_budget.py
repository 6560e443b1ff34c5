"""The makespan optimum against brute force, its multipliers, and the policies that follow from them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from rl_accel.draft import budget
from rl_accel.draft.budget import FixedCosts, acceptance, expected_multipliers, makespan_optimum, proposed_tokens
from rl_accel.draft.cost import StepCostModel
from rl_accel.errors import DraftError

H100 = FixedCosts(base_s=8e-3, per_request_s=5e-5, per_draft_s=2.5e-5)
COSTS = {
    "paper": FixedCosts(8e-3, 0.0, 2.5e-5),
    "cheap drafts": H100,
    "expensive drafts": FixedCosts(8e-3, 2e-5, 6e-5),
    "drafts never worth it": FixedCosts(1e-3, 0.0, 1.0),
    "no base": FixedCosts(0.0, 1e-3, 4e-4),
}

batches = st.integers(1, 5).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(1.0, 2e4), min_size=n, max_size=n).map(np.array),
        st.lists(st.floats(0.05, 1.0), min_size=n, max_size=n).map(np.array),
        st.lists(st.floats(0.05, 3.0), min_size=n, max_size=n).map(np.array),
    )
)
costs = st.builds(FixedCosts, st.floats(1e-4, 0.1), st.floats(0.0, 1e-3), st.floats(1e-6, 1e-3))


def total_seconds(proposed, lengths, k, alpha, cost):
    steps = lengths - acceptance(proposed, lengths, k, alpha)
    return cost.base_s * steps.max() + cost.per_request_s * steps.sum() + cost.per_draft_s * proposed.sum()


def brute_force(lengths, k, alpha, cost):
    """Least J by SLSQP over (N / max l, p / l) with N as a variable above every request's steps."""
    scale, n = lengths.max(), len(lengths)

    def steps(x):
        return lengths - acceptance(x[1:] * lengths, lengths, k, alpha)

    def objective(x):
        own = cost.per_request_s * steps(x).sum() + cost.per_draft_s * (x[1:] * lengths).sum()
        return (cost.base_s * x[0] * scale + own) / (scale * (cost.base_s + cost.per_request_s))

    best = np.inf
    for start in (0.0, 0.5, 3.0):
        x = minimize(
            objective,
            np.r_[1.0, np.full(n, start)],
            bounds=[(0.0, 1.0)] + [(0.0, 60.0)] * n,
            constraints={"type": "ineq", "fun": lambda x: (x[0] * scale - steps(x)) / scale},
            options={"ftol": 1e-13, "maxiter": 500},
        ).x
        best = min(best, total_seconds(np.maximum(x[1:], 0.0) * lengths, lengths, k, alpha, cost))
    return best


def test_printed_equation_7_misses_its_own_constraint():
    """DAS Eq 7 as printed proposes 2651 tokens and leaves 6040 steps, not 4000; the inverse of Eq 4 proposes 7709."""
    length, k, alpha, num_steps = 8000.0, 0.7, 1.3, 4000.0
    printed = -length / alpha * np.log(1 - k * (1 - num_steps / length))
    assert printed == pytest.approx(2651, abs=0.5)
    assert length - acceptance(printed, length, k, alpha) == pytest.approx(6040, abs=0.5)
    ours = proposed_tokens(num_steps, length, k, alpha)
    assert ours == pytest.approx(7709, abs=0.5)
    assert length - acceptance(ours, length, k, alpha) == pytest.approx(num_steps, rel=1e-12)


@settings(max_examples=200, deadline=None)
@given(length=st.floats(1.0, 1e5), k=st.floats(0.01, 1.0), alpha=st.floats(0.01, 5.0), part=st.floats(0.0, 1.2))
def test_proposed_tokens_invert_acceptance(length, k, alpha, part):
    num_steps = length * (1 - k * (1 - part))
    proposed = proposed_tokens(num_steps, length, k, alpha)
    if part >= 1.0:
        assert proposed == pytest.approx(0.0, abs=1e-9 * length / (k * alpha))
    elif part > 1e-6:
        assert length - acceptance(proposed, length, k, alpha) == pytest.approx(num_steps, rel=1e-8)
    assert proposed_tokens(length * (1 - k) * 0.999 - 1e-9, length, k, alpha) == np.inf


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", COSTS)
def test_equals_brute_force(name, seed):
    rng = np.random.default_rng(seed)
    n = 1 + seed % 3
    lengths, k, alpha = rng.uniform(50, 10_000, n), rng.uniform(0.2, 0.95, n), rng.uniform(0.3, 2.0, n)
    if seed == 3:
        k = np.ones(n)
    plan, want = makespan_optimum(lengths, k, alpha, COSTS[name]), brute_force(lengths, k, alpha, COSTS[name])
    assert plan.seconds <= want * (1 + 1e-9)
    assert plan.seconds == pytest.approx(want, rel=1e-5)


@settings(max_examples=200, deadline=None)
@given(batch=batches, cost=costs, seed=st.integers(0, 1000))
def test_no_step_improves_the_plan(batch, cost, seed):
    """J is convex, so a plan that no nearby one beats is optimal. Also: its fields agree with each other."""
    plan, rng = makespan_optimum(*batch, cost), np.random.default_rng(seed)
    steps = batch[0] - acceptance(plan.proposed, *batch)
    assert plan.seconds == pytest.approx(total_seconds(plan.proposed, *batch, cost), rel=1e-12)
    assert plan.num_steps == steps.max() and (plan.proposed >= 0).all()
    for size in (1e-4, 1e-2, 1.0):
        for _ in range(10):
            other = np.maximum(plan.proposed + size * batch[0] * rng.standard_normal(len(steps)), 0.0)
            assert total_seconds(other, *batch, cost) >= plan.seconds * (1 - 1e-9)


@settings(max_examples=200, deadline=None)
@given(batch=batches, cost=costs)
def test_multipliers_satisfy_the_optimality_conditions(batch, cost):
    """They sum to base_s, belong to the last requests, and cover every draft token that is proposed."""
    lengths, k, alpha = batch
    plan = makespan_optimum(*batch, cost)
    assert plan.multipliers.sum() == pytest.approx(cost.base_s, rel=1e-9) and (plan.multipliers >= 0).all()
    steps = lengths - acceptance(plan.proposed, *batch)
    assert (steps[plan.multipliers > 1e-9 * cost.base_s] >= plan.num_steps * (1 - 1e-6)).all()
    next_token = k * alpha * np.exp(-alpha * plan.proposed / lengths)
    worth = next_token * (plan.multipliers + cost.per_request_s)
    tolerance = 1e-4 * cost.per_draft_s
    assert (worth <= cost.per_draft_s + tolerance).all()
    proposing = plan.proposed > 1e-6 * lengths
    assert (worth[proposing] >= cost.per_draft_s - tolerance).all()
    least = budget.min_path_probs(plan.multipliers, cost)
    sure = proposing & (next_token > budget.MIN_PROBABILITY)
    np.testing.assert_allclose(least[sure], next_token[sure], rtol=1e-3)


@settings(max_examples=150, deadline=None)
@given(batch=batches, cost=costs, factor=st.floats(1.0, 100.0))
def test_drafts_that_cost_more_are_never_proposed_more(batch, cost, factor):
    before = makespan_optimum(*batch, cost)
    after = makespan_optimum(*batch, FixedCosts(cost.base_s, cost.per_request_s, factor * cost.per_draft_s))
    assert (after.proposed <= before.proposed + 1e-5 * (1.0 + batch[0] / (batch[1] * batch[2]))).all()
    assert after.num_steps >= before.num_steps * (1 - 1e-9) and after.seconds >= before.seconds * (1 - 1e-9)


def test_ties_share_equally_where_drafts_do_not_pay():
    plan = makespan_optimum(np.array([100.0, 90.0, 100.0]), 0.7, 1.0, COSTS["drafts never worth it"])
    assert plan.num_steps == 100.0 and not plan.proposed.any()
    np.testing.assert_allclose(plan.multipliers, [5e-4, 0.0, 5e-4], rtol=1e-9)


def test_optimum_at_the_length_of_the_second():
    """Shortening the straggler to 90 steps is worth it, shortening both is not: 90 steps, the second gets the rest."""
    cost, k, alpha = FixedCosts(2.0, 0.0, 1.0), 0.8, 1.0
    plan = makespan_optimum(np.array([100.0, 90.0]), k, alpha, cost)
    straggler = 1.0 / (k - 1 + 0.9)
    assert plan.num_steps == pytest.approx(90.0, rel=1e-9) and plan.proposed[1] == pytest.approx(0.0, abs=1e-6)
    np.testing.assert_allclose(plan.multipliers, [straggler, 2.0 - straggler], rtol=1e-6)
    assert plan.seconds == pytest.approx(brute_force(np.array([100.0, 90.0]), k, alpha, cost), rel=1e-6)


def test_free_drafts_and_finished_requests():
    plan = makespan_optimum(np.array([1000.0, 0.0]), 0.7, 1.3, FixedCosts(8e-3, 5e-5, 0.0))
    assert plan.num_steps == pytest.approx(300.0, rel=1e-3) and np.isfinite(plan.proposed).all()
    assert plan.proposed[1] < 1e-6 and plan.multipliers == pytest.approx([8e-3, 0.0])
    assert makespan_optimum(np.zeros(0), 0.7, 1.3, H100).seconds == 0.0
    assert expected_multipliers(np.zeros((8, 0)), 0.7, 1.3, H100).shape == (0,)
    assert expected_multipliers(np.zeros((8, 4)), 0.7, 1.3, H100) == pytest.approx([2e-3] * 4)


@pytest.mark.parametrize("name", COSTS)
def test_scenarios_are_solved_as_one_by_one(name):
    remaining = np.random.default_rng(0).lognormal(6.0, 1.0, (8, 37))
    k, alpha = np.random.default_rng(1).uniform(0.3, 1.0, (2, 37))
    want = np.mean([makespan_optimum(row, k, alpha, COSTS[name]).multipliers for row in remaining], axis=0)
    got = expected_multipliers(remaining, k, alpha, COSTS[name])
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-6 * COSTS[name].base_s)  # forecasts halve less often
    alone = [expected_multipliers(row[None], k, alpha, COSTS[name]) for row in remaining]
    np.testing.assert_allclose(got, np.mean(alone, axis=0), rtol=1e-9, atol=1e-15)
    assert got.sum() == pytest.approx(COSTS[name].base_s, rel=1e-9)


def test_requests_that_cannot_be_told_apart_share_base_s():
    """4000 scenarios of 16 equal requests: each mean within 5 standard errors of base_s / 16, the throughput rule."""
    remaining = np.random.default_rng(0).exponential(500.0, (4000, 16)) + 1.0
    one_by_one = np.stack([expected_multipliers(row[None], 0.7, 1.3, H100) for row in remaining])
    got, error = expected_multipliers(remaining, 0.7, 1.3, H100), one_by_one.std(axis=0) / np.sqrt(4000)
    assert (np.abs(got - H100.base_s / 16) < 5 * error).all() and (error < 0.07 * H100.base_s / 16).all()
    same = expected_multipliers(np.full((3, 16), 700.0), 0.7, 1.3, H100)
    np.testing.assert_allclose(same, H100.base_s / 16, rtol=1e-9)


def test_a_clear_straggler_gets_nearly_all():
    remaining = np.random.default_rng(0).uniform(50, 500, (8, 64))
    remaining[:, 11] = 8000.0
    got = expected_multipliers(remaining, 0.7, 1.3, H100)
    assert got[11] > 0.999 * H100.base_s
    least = budget.min_path_probs(got, H100)
    assert least.dtype == np.float32 and least[11] == np.float32(budget.MIN_PROBABILITY)
    assert (np.delete(least, 11) > 0.45).all()


def test_thresholds():
    multipliers = np.array([0.0, 2.5e-5, 1.0])
    assert budget.min_path_probs(multipliers, FixedCosts(1.0, 0.0, 2.5e-5)).tolist() == pytest.approx(
        [np.inf, 1.0, 0.01]
    )
    assert budget.min_path_probs(multipliers, FixedCosts(1.0, 2.5e-5, 5e-5)).tolist() == pytest.approx([2.0, 1.0, 0.01])
    assert budget.min_path_probs(np.array([1e-60, 1e-320]), FixedCosts(1.0, 0.0, 1e-5)).tolist() == [np.inf, np.inf]
    assert budget.min_path_probs(np.zeros(2), FixedCosts(1.0, 0.0, 0.0)).tolist() == [np.inf, np.inf]


def test_class_caps():
    classes = np.array([0, 1, 2, 1], np.int8)
    for max_draft, want in ((32, [0, 8, 32, 8]), (3, [0, 1, 3, 1]), (0, [0, 0, 0, 0])):
        max_draft_tokens = budget.class_max_draft(classes, max_draft)
        assert max_draft_tokens.dtype == np.int32 and max_draft_tokens.tolist() == want


def test_a_learned_cost_is_a_price():
    fit = StepCostModel()
    with pytest.raises(DraftError, match="observe steps before planning"):
        makespan_optimum(np.array([100.0]), 0.7, 1.3, fit)
    for n in range(1, 100):
        fit.observe(8e-3 + 5e-5 * n + 1e-5 * (n % 7), n, n % 7)
    assert makespan_optimum(np.array([100.0, 5000.0]), 0.7, 1.3, fit).num_steps < 5000


@pytest.mark.parametrize(
    ("lengths", "k", "alpha", "message"),
    [
        ([-1.0], 0.7, 1.0, "finite lengths"),
        ([np.nan], 0.7, 1.0, "finite lengths"),
        ([[1.0]], 0.7, 1.0, "finite lengths"),
        ([1.0], 0.0, 1.0, r"k in \(0, 1\]"),
        ([1.0], 1.1, 1.0, r"k in \(0, 1\]"),
        ([1.0], 0.5, 0.0, "alpha > 0"),
        ([1.0, 2.0], np.ones(3), 1.0, r"scalar or \[2\]"),
    ],
)
def test_wrong_arguments(lengths, k, alpha, message):
    with pytest.raises(DraftError, match=message):
        makespan_optimum(np.array(lengths), k, alpha, H100)
    with pytest.raises(DraftError, match="max_draft >= 0"):
        budget.class_max_draft(np.zeros(1, np.int8), -1)
