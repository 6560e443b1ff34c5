"""Response lengths: the distribution of the draws, shrinkage, extrapolation, classes, bounds, state."""

from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from rl_accel.draft import lengths
from rl_accel.draft.lengths import LONG, MEDIUM, SHORT, LengthModel
from rl_accel.errors import DraftError

ALPHA = 1e-6


def filled(observations, max_problems=100_000):
    model = LengthModel(max_problems)
    for key, length in observations:
        model.observe(int(key), int(length))
    return model


def random_model(seed, num=3000, problems=60):
    rng = np.random.default_rng(seed)
    scale = rng.lognormal(5.0, 1.0, problems)
    keys = rng.integers(0, problems, num)
    return filled(zip(keys, 1 + scale[keys] * rng.exponential(size=num), strict=True))


def draws(model, key, generated, num=100_000, seed=0, **kwargs):
    arguments = np.array([key]), np.array([generated]), num, np.random.default_rng(seed)
    return model.remaining(*arguments, **kwargs)[:, 0]


@pytest.mark.parametrize("generated", [0, 9, 10, 25, 49])
def test_draws_follow_the_conditional_mixture(generated):
    """Own and pooled records of 10 ... 60: P(L | L > l) counted by hand, 100,000 draws, alpha 1e-6."""
    support, rng = np.arange(10, 70, 10), np.random.default_rng(1)
    own = rng.choice(support[:5], 40, p=[0.3, 0.3, 0.2, 0.1, 0.1])
    pool = np.concatenate([rng.choice(support, 500), own])
    model = filled([(-1 - i, x) for i, x in enumerate(pool[:500])] + [(7, x) for x in own])
    own_left, pool_left = own[own > generated], pool[pool > generated]
    distribution = np.array([(own_left == x).sum() for x in support], float)
    distribution += lengths.POOL_WEIGHT * np.array([(pool_left == x).sum() for x in support]) / (len(pool_left) + 1)
    distribution = np.append(distribution, lengths.POOL_WEIGHT / (len(pool_left) + 1)) / (
        len(own_left) + lengths.POOL_WEIGHT
    )
    total = draws(model, 7, generated) + generated
    counts = np.array([*((total == x).sum() for x in support), (total > support[-1]).sum()])
    assert counts.sum() == len(total) and counts[distribution == 0].sum() == 0
    assert chisquare(counts[distribution > 0], distribution[distribution > 0] * len(total)).pvalue > ALPHA


def test_unknown_problem_has_the_law_of_the_pool():
    """4096 geometric lengths of mean 50, 30 generated: memoryless. KS on as many draws as records are longer."""
    rng = np.random.default_rng(3)
    model = filled(enumerate(rng.geometric(1 / 50, 4096)))
    left = draws(model, -1, 30, num=2000, seed=4)
    uniform = 1.0 - (1 - 1 / 50) ** (left - rng.random(2000))
    # Records and draws both scatter: the sum of two independent KS distances, each bounded at alpha / 2.
    assert kstest(uniform, "uniform").statistic < 2 * np.sqrt(np.log(4 / ALPHA) / (2 * 2000))
    assert left.mean() == pytest.approx(50, rel=0.15)


def test_many_own_lengths_override_the_pool():
    model = filled([(i, 100) for i in range(1000)] + [(5000, 900 + i) for i in range(64)])
    assert np.mean(draws(model, 5000, 50) > 800) == pytest.approx(64 / 68, abs=0.01)
    assert np.mean(draws(model, -1, 50) > 800) < 0.08
    assert draws(model, 5000, 950).mean() < 60


def test_behind_all_records_remaining_is_exponential():
    model = filled([(i, 100 + i) for i in range(200)])
    for generated, mean in ((299, 74.75), (1000, 250.0), (10**6, 250_000.0)):
        left = draws(model, 5, generated)
        assert left.min() >= 1.0 and left.mean() == pytest.approx(mean, rel=0.02)
    short = filled([(i, 3) for i in range(200)])
    assert draws(short, 0, 5).mean() == pytest.approx(lengths.MIN_MEAN_TOKENS + 0.5, rel=0.03)


def test_tail_of_the_pool_sets_the_hazard():
    """Tenth of the records spread over 1000 tokens: mean excess 500, more than a quarter of the length."""
    model = filled([(i, 10) for i in range(900)] + [(i, 10 * (i + 1)) for i in range(100)])
    assert draws(model, -1, 1000).mean() == pytest.approx(495, rel=0.03)


def test_no_history():
    model = LengthModel()
    assert draws(model, 1, 0).mean() == pytest.approx(8.5, rel=0.02)
    assert draws(model, 1, 4000).mean() == pytest.approx(1000.5, rel=0.02)
    assert model.length_class(np.array([1, 2]), np.array([0, 10**6])).tolist() == [MEDIUM, MEDIUM]
    assert np.isnan(model.median(1))
    assert model.remaining(np.array([], int), np.array([], int), 3, np.random.default_rng(0)).shape == (3, 0)
    assert model.length_class(np.array([], int), np.array([], int)).shape == (0,)


def test_limits_clip():
    model, keys = random_model(0), np.arange(-5, 60)
    generated, limits = np.full(65, 40), np.arange(65) % 9
    left = model.remaining(keys, generated, 500, np.random.default_rng(0), max_remaining=limits)
    assert (left <= limits).all() and (left >= np.minimum(limits, 1)).all() and (left == limits).mean() > 0.5
    free = model.remaining(keys, generated, 500, np.random.default_rng(0))
    np.testing.assert_array_equal(np.minimum(free, limits), left)


def plain(model: LengthModel) -> dict[str, list]:
    return {name: values.tolist() for name, values in model.state_dict().items()}


def by_problem(model: LengthModel) -> dict[int, list[int]]:
    state, at = plain(model), 0
    found = {}
    for key, count in zip(state["problems"], state["counts"], strict=True):
        found[key] = state["lengths"][at : at + count]
        at += count
    assert at == len(state["lengths"])
    return found


@settings(max_examples=60, deadline=None)
@given(
    observations=st.lists(st.tuples(st.integers(-3, 3), st.integers(1, 50)), max_size=400),
    generated=st.integers(0, 60),
    seed=st.integers(0, 100),
)
def test_against_deques(observations, generated, seed):
    """Windows equal plain deques, nothing is ever predicted to end at once, a class never falls."""
    model, own = filled(observations), {}
    for key, length in observations:
        own.setdefault(key, deque(maxlen=lengths.HISTORY)).append(length)
    model.check_integrity()
    assert by_problem(model) == {key: list(kept) for key, kept in own.items()}
    assert plain(model)["pool"] == [length for _, length in observations]
    for key, kept in own.items():
        assert model.median(key) == np.median(kept)
    keys = np.arange(-4, 4)
    left = model.remaining(keys, np.full(8, generated), 20, np.random.default_rng(seed))
    assert left.shape == (20, 8) and (left >= 1).all() and (left == np.floor(left)).all()
    classes = np.stack([model.length_class(keys, np.full(8, g)) for g in range(60)]).astype(int)
    assert (np.diff(classes, axis=0) >= 0).all() and set(classes.ravel().tolist()) <= {SHORT, MEDIUM, LONG}


def test_full_windows_drop_the_oldest():
    model = filled([(1, x) for x in range(1, 501)] + [(2, x) for x in range(1, 5001)])
    assert by_problem(model)[1] == list(range(437, 501))
    assert plain(model)["pool"] == list(range(905, 5001))
    model.check_integrity()


def test_classes_of_plain_problems():
    """A third of the problems each at 100, 1000 and 10000 tokens."""
    observations = [(key, (100, 1000, 10_000)[key % 3] + round_) for round_ in range(20) for key in range(90)]
    model = filled(observations)
    keys = np.array([0, 1, 2])
    assert model.length_class(keys, np.zeros(3, int)).tolist() == [SHORT, MEDIUM, LONG]
    assert model.length_class(keys, np.full(3, 2000)).tolist() == [LONG, LONG, LONG]
    assert model.length_class(keys, np.full(3, 500)).tolist() == [LONG, MEDIUM, LONG]
    assert model.length_class(np.array([-1]), np.array([10**9])).tolist() == [LONG]


def test_class_table_against_counts():
    """The runtime class is argmax_c P(c | longer than l, initial class), counted record by record."""
    model = random_model(2)
    model.median(-1)
    state, cuts = plain(model), np.sort(model.state_dict()["pool"])[[1000, 2000]]
    assert len(state["pool"]) == 3000 and {0, 1, 2} == set(state["pool_class"])
    for key, own in list(by_problem(model).items())[:30]:
        of_own = np.bincount(np.digitize(own, cuts), minlength=3)
        initial = 2 - of_own[::-1].argmax()
        for generated in (0, 40, 150, 700):
            alike = zip(state["pool"], state["pool_class"], strict=True)
            longer = [length for length, expected in alike if expected == initial and length > generated]
            want = 2 - np.bincount(np.digitize(longer, cuts), minlength=3)[::-1].argmax()
            assert model.length_class(np.array([key]), np.array([generated]))[0] == want


def test_number_of_problems_is_bounded():
    model = filled(((key, 1 + key % 7) for key in range(2000)), max_problems=300)
    model.observe(1700, 5)
    for key in range(3000, 3299):
        model.observe(key, 9)
    model.check_integrity()
    assert len(model) == 300
    assert list(by_problem(model)) == [1700, *range(3000, 3299)]
    assert model.memory_bytes() < 300 * lengths.BYTES_PER_PROBLEM + 2 * 8 * lengths.POOL
    assert by_problem(model)[1700] == [1700 % 7 + 1, 5]


def test_state_round_trip():
    model, other = random_model(1, num=9000), LengthModel()
    other.load_state_dict(model.state_dict())
    assert plain(model) == plain(other)
    keys, generated = np.arange(-2, 60), np.arange(62) * 7
    for _ in range(3):
        for key in range(0, 60, 2):
            model.observe(key, 50 + key)
            other.observe(key, 50 + key)
        one, two = (m.remaining(keys, generated, 8, np.random.default_rng(0)) for m in (model, other))
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(model.length_class(keys, generated), other.length_class(keys, generated))
    assert plain(model) == plain(other)
    small = LengthModel(max_problems=10)
    small.load_state_dict(model.state_dict())
    assert by_problem(small) == dict(list(by_problem(model).items())[-10:])


@pytest.mark.parametrize(
    "change",
    [
        {"pool": [0], "pool_class": [1]},
        {"pool": [5], "pool_class": [3]},
        {"pool": [5], "pool_class": []},
        {"pool": [5] * (lengths.POOL + 1), "pool_class": [1] * (lengths.POOL + 1)},
        {"pool": "abc"},
        {"problems": [1], "counts": [2], "lengths": [5, 2**31]},
        {"problems": [1], "counts": [1], "lengths": [5.5]},
        {"problems": [1], "counts": [0], "lengths": []},
        {"problems": [1], "counts": [65], "lengths": [5] * 65},
        {"problems": [1], "counts": [2], "lengths": [5]},
        {"problems": ["a"], "counts": [1], "lengths": [5]},
        {"problems": [2**63], "counts": [1], "lengths": [5]},
        {"problems": [1, 1], "counts": [1, 1], "lengths": [5, 6]},
        {"problems": [1], "counts": [1, 1], "lengths": [5, 6]},
        {"problems": np.zeros((1, 1), int), "counts": [1], "lengths": [5]},
        {"problems": 1},
        {"problems": None},
        {"more": 1},
    ],
)
def test_bad_state_is_refused_and_changes_nothing(change):
    model = random_model(0, num=50)
    before = plain(model)
    with pytest.raises(DraftError, match="not a saved state of LengthModel"):
        model.load_state_dict({**before, **change})
    assert plain(model) == before


def test_wrong_arguments():
    model, rng = LengthModel(), np.random.default_rng(0)
    for length in (0, -1, 2**31 - 1):
        with pytest.raises(DraftError, match="expected a response length"):
            model.observe(1, length)
    with pytest.raises(DraftError, match="problem_keys: expected 2 integers"):
        model.remaining(np.array([1]), np.array([1, 2]), 3, rng)
    with pytest.raises(DraftError, match="problem_keys: expected 1 integers, got float64"):
        model.remaining(np.array([1.0]), np.array([1]), 3, rng)
    with pytest.raises(DraftError, match="generated: expected values of 0"):
        model.length_class(np.array([1]), np.array([-1]))
    with pytest.raises(DraftError, match="max_remaining: expected values of 0"):
        model.remaining(np.array([1]), np.array([1]), 3, rng, max_remaining=np.array([-1]))
    with pytest.raises(DraftError, match="max_problems >= 1"):
        LengthModel(0)
