"""The fit of step times: known coefficients under noise, changes of regime, priors, state."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_accel.draft import cost
from rl_accel.draft.cost import StepCostModel
from rl_accel.errors import DraftError

TRUE = (8e-3, 5e-5, 2e-5)
"""Seconds of base, request, draft token: a 7B model on H100 (DAS Fig 8), drafts cheaper than requests."""


def seconds(num_requests, num_drafts, true=TRUE, speculation=0.0):
    return true[0] + true[1] * num_requests + true[2] * num_drafts + speculation * (num_drafts > 0)


def coefficients(fit):
    return fit.base_s, fit.per_request_s, fit.per_draft_s


def feed(fit, rng, num_steps, noise=0.2, outliers=0.02, slower=1.0, drafts=lambda rng, n: n * int(rng.integers(0, 5))):
    """Observe steps of 1 to 256 requests; an outlier takes ten times as long."""
    for _ in range(num_steps):
        n = int(rng.integers(1, 257))
        d = drafts(rng, n)
        time = slower * seconds(n, d) * max(0.05, 1.0 + noise * rng.standard_normal())
        fit.observe(time * (10.0 if rng.random() < outliers else 1.0), n, d)
    return fit


@pytest.mark.parametrize("seed", range(8))
def test_known_coefficients_under_noise_and_outliers(seed):
    """Over 150 seeds the standard deviations are 2.0, 4.1, 3.8 % and the bias is 1 %; the bounds are five of them."""
    fit = feed(StepCostModel(), np.random.default_rng(seed), 1500)
    for got, want, tolerance in zip(coefficients(fit), TRUE, (0.11, 0.22, 0.21), strict=True):
        assert got == pytest.approx(want, rel=tolerance)
    assert fit.predict(128, 256) == pytest.approx(seconds(128, 256), rel=0.1)
    assert fit.ready and 0.1 < fit.relative_error < 0.3


def test_equals_the_batch_solution():
    """Against numpy's least squares on all rows with both priors as further rows; noise too small to be clipped."""
    rng, fit, rows, times = np.random.default_rng(0), StepCostModel(), [], []
    for _ in range(300):
        n, d = int(rng.integers(1, 65)), int(rng.integers(0, 2)) * int(rng.integers(0, 200))
        time = seconds(n, d, speculation=1e-3) * rng.uniform(0.99, 1.01)
        predicted = fit.predict(n, d) or time
        rows.append(np.array([1.0, d > 0, n, d]) / predicted)
        times.append(time / predicted)
        fit.observe(time, n, d)
        assert abs(times[-1] - 1.0) < cost.HUBER_CLIP * fit.relative_error or len(rows) < 10
    decay = np.sqrt(cost.KEEP ** np.arange(300)[::-1])
    x, y = np.array(rows) * decay[:, None], np.array(times) * decay
    ww, _, nn, dd = (x**2).sum(axis=0) * cost.PRIOR_STEPS / (decay**2).sum()
    same, size = np.sqrt(nn + dd), np.sqrt(nn)
    priors = [[0, 0, same, -same], [-size / cost.PRIOR_TOKENS_PER_BASE, 0, size, 0], [0, np.sqrt(ww), 0, 0]]
    want = np.linalg.lstsq(np.concatenate([x, priors]), np.append(y, [0.0, 0.0, 0.0]), rcond=None)[0]
    np.testing.assert_allclose((fit.base_s, fit.speculation_s, fit.per_request_s, fit.per_draft_s), want, rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_the_price_of_speculating_at_all_is_told_from_that_of_a_token(seed):
    fit, rng = StepCostModel(), np.random.default_rng(seed)
    for _ in range(1000):
        n, d = int(rng.integers(1, 257)), int(rng.integers(0, 2)) * int(rng.integers(1, 300))
        fit.observe(seconds(n, d, speculation=4e-3) * (1.0 + 0.1 * rng.standard_normal()), n, d)
    assert fit.speculation_s == pytest.approx(4e-3, rel=0.2)
    assert fit.per_draft_s == pytest.approx(TRUE[2], rel=0.25)
    assert fit.predict(100, 0) == pytest.approx(seconds(100, 0), rel=0.05)


def test_where_every_step_speculates_nothing_is_said_to_be_its_price():
    fit = feed(
        StepCostModel(), np.random.default_rng(0), 1000, noise=0.05, drafts=lambda rng, n: n * int(rng.integers(1, 5))
    )
    assert fit.speculation_s < 0.05 * fit.base_s
    assert fit.predict(200, 600) == pytest.approx(seconds(200, 600), rel=0.05)


@pytest.mark.parametrize("slower", [2.0, 0.5, 4.0])
@pytest.mark.parametrize("seed", range(3))
def test_follows_a_lasting_change_within_200_steps(seed, slower):
    rng, fit = np.random.default_rng(seed), StepCostModel()
    feed(fit, rng, 1000)
    feed(fit, rng, 200, slower=slower)
    assert fit.predict(128, 256) == pytest.approx(slower * seconds(128, 256), rel=0.15)


def test_single_outliers_hardly_move_the_fit():
    fit = feed(StepCostModel(), np.random.default_rng(0), 600, noise=0.05, outliers=0.0)
    before = fit.predict(128, 256)
    for factor in (10.0, 1000.0, 1e-3):
        fit.observe(factor * seconds(128, 256), 128, 256)
    assert fit.predict(128, 256) == pytest.approx(before, rel=0.01)


def test_recovers_from_a_slow_first_pass():
    fit = StepCostModel()
    fit.observe(100.0 * seconds(128, 256), 128, 256)
    feed(fit, np.random.default_rng(0), 150)
    assert fit.predict(128, 256) == pytest.approx(seconds(128, 256), rel=0.2)


def test_noise_alone_is_no_change_of_regime():
    """At each of 20,000 steps the memory stays long; a false alarm would cut it to STEPS_KEPT."""
    fit, rng = feed(StepCostModel(), np.random.default_rng(1), 200), np.random.default_rng(2)
    for _ in range(200):
        feed(fit, rng, 100)
        assert fit.state_dict()["weight"] > 160.0


@settings(max_examples=100, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.floats(1e-6, 1e3), st.integers(1, 2000), st.integers(0, 10**5)), min_size=1, max_size=60
    )
)
def test_coefficients_are_finite_and_never_negative(steps):
    fit = StepCostModel()
    for observed in steps:
        fit.observe(*observed)
        assert all(0.0 <= x < math.inf for x in coefficients(fit))
        assert 0.0 < fit.predict(*observed[1:]) < math.inf


def test_drafts_that_speed_steps_up_cost_nothing():
    fit, rng = StepCostModel(), np.random.default_rng(0)
    for _ in range(300):
        n, d = int(rng.integers(1, 257)), int(rng.integers(0, 100))
        fit.observe(seconds(n, 0) - 5e-5 * d, n, d)
    assert fit.per_draft_s == 0.0 and fit.base_s > 0.0 and fit.per_request_s > 0.0


def test_collinear_inputs_give_the_papers_model():
    """Three drafts a request in every step: only per_request_s + 3 per_draft_s shows, and both come out equal."""
    fit = feed(StepCostModel(), np.random.default_rng(0), 2000, noise=0.05, drafts=lambda rng, n: 3 * n)
    token_s = (TRUE[1] + 3 * TRUE[2]) / 4
    assert coefficients(fit) == pytest.approx((TRUE[0], token_s, token_s), rel=0.1)
    assert fit.predict(200, 600) == pytest.approx(seconds(200, 600), rel=0.05)


def test_steps_of_one_size_predict_themselves_and_are_not_ready():
    fit = StepCostModel()
    for _ in range(1000):
        fit.observe(0.02, 64, 128)
    assert fit.predict(64, 128) == pytest.approx(0.02, rel=0.01)
    assert fit.per_draft_s == pytest.approx(fit.per_request_s, rel=0.01)
    assert fit.base_s == pytest.approx(cost.PRIOR_TOKENS_PER_BASE * fit.per_request_s, rel=0.01)
    assert not fit.ready


def test_ready_needs_drafts_and_forgets_them():
    fit, rng = StepCostModel(), np.random.default_rng(0)
    feed(fit, rng, 500, drafts=lambda rng, n: 0)
    assert not fit.ready and fit.per_draft_s == pytest.approx(fit.per_request_s, rel=1e-6)
    feed(fit, rng, 50)
    assert fit.ready
    feed(fit, rng, 2000, drafts=lambda rng, n: 0)
    assert not fit.ready


def test_state_round_trip_through_json():
    fit = feed(StepCostModel(), np.random.default_rng(0), 700)
    other = StepCostModel()
    other.load_state_dict(json.loads(json.dumps(fit.state_dict())))
    for model in (fit, other):
        feed(model, np.random.default_rng(5), 50)
    assert other.state_dict() == fit.state_dict() and coefficients(other) == coefficients(fit)
    other.load_state_dict(StepCostModel().state_dict())
    assert coefficients(other) == (0.0, 0.0, 0.0) and not other.ready


@pytest.mark.parametrize(
    "change",
    [
        {"gram": [[1.0] * 3] * 3},
        {"gram": [[math.nan] * 4] * 4},
        {"gram": [[1.0, 0.0, 5.0, 0.0], [0.0] * 4, [5.0, 0.0, 1.0, 0.0], [0.0] * 4]},
        {"gram": [[1.0, 0.5, 0.5, 0.5], [0.0, 1.0, 0.5, 0.5], [0.0, 0.0, 1.0, 0.5], [0.0, 0.0, 0.0, 1.0]]},
        {"gram": "abc"},
        {"moments": [1.0] * 3},
        {"moments": [-1.0] * 4},
        {"num_steps": 0},
        {"weight": -1.0},
        {"error": 0.0},
        {"drift": None},
        {"more": 1},
    ],
)
def test_bad_state_is_refused_and_changes_nothing(change):
    fit = feed(StepCostModel(), np.random.default_rng(0), 100)
    before = fit.state_dict()
    with pytest.raises(DraftError, match="not a saved state of StepCostModel"):
        fit.load_state_dict({**before, **change})
    assert fit.state_dict() == before


@pytest.mark.parametrize("observed", [(0.0, 1, 0), (math.nan, 1, 0), (math.inf, 1, 0), (0.1, 0, 0), (0.1, 1, -1)])
def test_impossible_step_is_refused(observed):
    fit = StepCostModel()
    with pytest.raises(DraftError, match="expected seconds > 0"):
        fit.observe(*observed)
    assert fit.state_dict() == StepCostModel().state_dict()
