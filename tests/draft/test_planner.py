"""The planner: limits stay in range whatever was measured, and what was learned survives a restart."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_accel.draft.planner import FIRST_MIN_PATH_PROB, PROBE_EVERY, Planner
from rl_accel.errors import DraftError

NO_LIMITS = 1 << 30


def measured(policy: str = "budget", costs=(0.02, 1e-4, 1e-4), seed: int = 0, **kwargs) -> Planner:
    """A planner that has seen 200 steps of varied sizes."""
    planner, rng = Planner(policy, 16, **kwargs), random.Random(seed)
    for _ in range(200):
        n, d = rng.randint(1, 64), rng.randint(0, 200)
        planner.observe_step(costs[0] + costs[1] * n + costs[2] * d, n, d)
    assert planner.cost.ready and not planner.probing
    return planner


def with_lengths(planner: Planner, seed: int = 0) -> Planner:
    rng = random.Random(seed)
    for problem in range(40):
        for _ in range(4):
            planner.lengths.observe(problem, 1000 + rng.randint(0, 50) if problem < 3 else rng.randint(20, 60))
    return planner


def plan(planner: Planner, n: int = 40, generated: int = 5, limit: int = NO_LIMITS):
    return planner.plan(np.arange(n), np.full(n, generated), np.full(n, limit))


@pytest.mark.parametrize("policy", ["fixed", "classes", "budget"])
@pytest.mark.parametrize(("limit", "cap"), [(1, 0), (2, 1), (9, 8), (17, 16), (NO_LIMITS, 16)])
def test_no_draft_goes_beyond_the_limit_of_its_request(policy, limit, cap) -> None:
    """The target adds a token to every draft, so a request that may generate one more needs none."""
    max_draft_tokens, _ = plan(Planner(policy, 16), n=3, limit=limit)
    assert max_draft_tokens.dtype == np.uint32
    expected = {"classes": min(cap, 4)}.get(policy, cap)  # without history all are of the middle class
    assert max_draft_tokens.tolist() == [expected] * 3


def test_without_step_times_nothing_has_a_price() -> None:
    assert plan(with_lengths(Planner("budget", 16)))[1].tolist() == [0.0] * 40


def test_until_prices_are_known_likely_tokens_are_drafted() -> None:
    planner = Planner("budget", 16)
    planner.observe_step(0.01, 4, 0)
    assert planner.probing
    assert np.allclose(plan(planner)[1], FIRST_MIN_PATH_PROB)


def test_without_history_all_requests_have_one_threshold() -> None:
    """A draft token then has to be worth its cost by throughput: per_draft / (base / n + per_request)."""
    _, min_path_probs = plan(measured(), n=40)
    assert len(set(min_path_probs.tolist())) == 1
    assert min_path_probs[0] == pytest.approx(1e-4 / (0.02 / 40 + 1e-4), rel=0.05)


def test_what_is_dear_needs_better_odds_and_stragglers_need_less() -> None:
    cheap, expensive = (with_lengths(measured(costs=(0.02, 1e-4, price))) for price in (1e-4, 1e-3))
    means = [np.mean([plan(p)[1] for _ in range(20)], axis=0) for p in (cheap, expensive)]
    assert (means[1] > 3 * means[0]).all()
    assert means[0][:3].max() < 0.3 * means[0][3:].min()


def test_a_probe_comes_after_steps_without_drafts_and_ends_with_the_next_draft() -> None:
    planner = measured()
    for _ in range(PROBE_EVERY):
        assert not planner.probing
        planner.observe_step(0.024, 40, 0)
    assert planner.probing
    assert np.allclose(plan(planner)[1], FIRST_MIN_PATH_PROB)
    planner.observe_step(0.024 + 4e-3, 40, 40)
    assert not planner.probing
    assert not np.allclose(plan(planner)[1], FIRST_MIN_PATH_PROB)


def test_a_probe_goes_on_while_steps_are_shorter_than_predicted() -> None:
    planner = measured(costs=(0.02, 1e-4, 2e-3))
    for _ in range(PROBE_EVERY):
        planner.observe_step(0.024, 40, 0)
    plan(planner)
    for _ in range(15):
        planner.observe_step(0.024, 40, 40)
    assert not planner.probing
    assert np.allclose(plan(planner)[1], FIRST_MIN_PATH_PROB), "drafts cost nothing now, the fit does not know yet"
    for _ in range(100):
        planner.observe_step(0.024, 40, 40)
        if planner.probed:
            min_path_probs = plan(planner)[1]
    assert not planner.probed and min_path_probs.max() < 0.3, "now it does"


def test_a_step_that_cannot_be_is_refused_and_not_learned() -> None:
    planner = Planner("budget", 16)
    for bad in ((0.0, 1, 0), (0.01, 0, 0), (0.01, 1, -1), (float("nan"), 1, 0)):
        with pytest.raises(DraftError):
            planner.observe_step(*bad)
    assert not planner.timed and planner.cost.predict(1, 1) == 0.0


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(1e-6, 10.0), min_size=1, max_size=120),
    st.integers(1, 300),
    st.tuples(st.floats(0, 1), st.floats(0, 40)),
    st.integers(0, 1 << 31),
)
def test_thresholds_and_caps_are_in_range_whatever_was_measured(seconds, n, candidates, seed) -> None:
    planner, rng = Planner("budget", 16, seed), np.random.default_rng(seed)
    for s in seconds:
        planner.observe_step(s, int(rng.integers(1, 300)), int(rng.integers(0, 900)))
    planner.observe_candidates(100, 100 * candidates[0], 100 * candidates[1])
    for problem, length in zip(rng.integers(0, 30, 50).tolist(), rng.integers(1, 9000, 50).tolist(), strict=True):
        planner.lengths.observe(problem, length)
    limits = rng.integers(1, 40, n)
    max_draft_tokens, min_path_probs = planner.plan(rng.integers(0, 40, n), rng.integers(0, 9000, n), limits)
    assert max_draft_tokens.dtype == np.uint32 and min_path_probs.dtype == np.float32
    assert max_draft_tokens.shape == min_path_probs.shape == (n,)
    assert (max_draft_tokens <= np.minimum(16, limits - 1)).all()
    assert (min_path_probs >= 0.01).all() and not np.isnan(min_path_probs).any()


@pytest.mark.parametrize("seed", [0, 7])
def test_a_seed_gives_the_same_plan(seed) -> None:
    first, second, other = (plan(with_lengths(measured(seed=1, **{}))) for _ in range(3))
    assert np.array_equal(first[1], second[1]) and np.array_equal(first[1], other[1])
    assert not np.array_equal(first[1], plan(with_lengths(reseeded(seed + 1)))[1])


def reseeded(seed: int) -> Planner:
    planner = Planner("budget", 16, seed)
    planner.load_state_dict(measured(seed=1).state_dict())
    planner.timed = True
    return planner


def plain(planner: Planner) -> dict:
    state = planner.state_dict()
    return {**state, "lengths": {name: values.tolist() for name, values in state["lengths"].items()}}


def test_a_saved_state_comes_back_whole() -> None:
    planner = with_lengths(measured())
    planner.observe_candidates(1000, 700.0, 2500.0)
    state = json.loads(json.dumps(plain(planner)))
    copy = Planner("budget", 16)
    copy.load_state_dict(state)
    assert plain(copy) == plain(planner) == state
    assert copy.cost.predict(9, 9) == planner.cost.predict(9, 9)
    assert not copy.timed, "until this host reports step times, no cost is known"
    copy.observe_step(0.03, 40, 40)
    planner.observe_step(0.03, 40, 40)
    assert np.array_equal(plan(copy)[1], plan(planner)[1])


BAD = {
    "no cost": lambda s: s.pop("cost"),
    "no lengths": lambda s: s.pop("lengths"),
    "no acceptance": lambda s: s.pop("accepted"),
    "acceptance is a text": lambda s: s.update(accepted="many"),
    "acceptance is negative": lambda s: s.update(accepted=-0.1),
    "acceptance is not a number": lambda s: s.update(accepted=float("nan")),
    "acceptance is huge": lambda s: s.update(accepted=10**400),
    "first is no probability": lambda s: s.update(first=1.5),
    "cost is a list": lambda s: s.update(cost=[]),
    "cost without sums": lambda s: s["cost"].pop("gram"),
    "cost of infinite steps": lambda s: s["cost"].update(num_steps=float("inf")),
    "lengths of a text": lambda s: s["lengths"].update(pool=["x"]),
    "negative lengths": lambda s: s["lengths"].update(pool=[-1] * len(s["lengths"]["pool"])),
    "problems by name": lambda s: s["lengths"].update(problems={"a": [1]}),
    "lengths is a list": lambda s: s.update(lengths=[1]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_state_is_refused_and_the_present_one_kept(name) -> None:
    planner = with_lengths(measured())
    before, bad = plain(planner), with_lengths(measured(seed=1), seed=1).state_dict()
    BAD[name](bad)
    with pytest.raises(DraftError, match="not a saved state"):
        planner.load_state_dict(bad)
    assert plain(planner) == before
