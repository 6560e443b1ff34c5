"""Who gets how much rank, and what a budget buys."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_accel.errors import MoEError
from rl_accel.moe import budget, ranks
from rl_accel.moe.compress import Method, compress


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.integers(0, 20), st.integers(20, 64))
def test_the_mean_rank_is_kept_to_the_unit(weights, rank, max_rank):
    found = ranks.proportional(weights, rank, max_rank)
    assert sum(found) == rank * len(weights)
    assert all(0 <= r <= max_rank for r in found)
    for (a, x), (b, y) in itertools.combinations(zip(weights, found, strict=True), 2):
        assert x >= y - 1 if a >= b else y >= x - 1


def test_ranks_are_shared_out_in_proportion():
    assert ranks.proportional([1, 2, 5], 8, 100) == [3, 6, 15]
    assert ranks.proportional([0, 0, 0], 8, 100) == [8, 8, 8]
    assert ranks.proportional([1, 1, 100], 8, 12) == [6, 6, 12]
    with pytest.raises(MoEError, match="more than these matrices have"):
        ranks.proportional([1.0], 9, 8)
    with pytest.raises(MoEError, match="not negative"):
        ranks.proportional([1.0, -1.0], 2, 8)


def test_heavy_tails_get_the_ranks():
    w = gaussian(3, 64, 64)
    w[1] = w[1] ** 3
    found = ranks.kurtosis(w, 6)
    assert found[1] > 15 and sum(found) == 18


def test_a_budget_is_spent_and_not_exceeded():
    tensors = {"a": gaussian(4, 64, 128), "b": gaussian(2, 128, 64)}
    curves = {name: budget.curves(w, 64) for name, w in tensors.items()}
    num = sum(w.numel() for w in tensors.values())
    for bits in (2.5, 2.8, 3.3, 3.7, 4.2, 4.5, 5.0):
        plan = budget.allocate(curves, int(bits * num / 8))
        used = 0
        for name, tensor in plan.items():
            found = compress(tensors[name], tensor.bits, 64, tensor.ranks, Method(alternations=1))
            used += found.memory_bytes() - (4 * (len(tensors[name]) + 1) if found.factors else 0)
        assert used <= bits * num / 8
        assert used > bits * num / 8 - 4 * budget.rank_bytes(64, 128), bits
    with pytest.raises(MoEError, match="below the"):
        budget.allocate(curves, int(2.4 * num / 8))


def test_plain_4_bits_win_on_narrow_matrices_and_ranks_on_low_rank_ones():
    narrow = {"narrow": budget.curves(gaussian(4, 64, 128), 64)}
    size = 4 * 64 * 128
    plan = budget.allocate(narrow, int(4.5 * size / 8))["narrow"]
    assert plan.bits == 4 and set(plan.ranks) == {0}
    low = gaussian(2, 256, 512) + 8 * gaussian(2, 256, 4, seed=1) @ gaussian(2, 4, 512, seed=2)
    plan = budget.allocate({"low": budget.curves(low, 64)}, int(3.7 * low.numel() / 8))["low"]
    assert plan.bits == 3 and min(plan.ranks) >= 4


def test_a_budget_finds_what_trying_everything_finds():
    """Two tensors, all widths and all uniform ranks: the predicted error of the plan is not above the best of these."""
    tensors = {"a": gaussian(1, 64, 64), "b": gaussian(1, 64, 64) + 4 * gaussian(1, 64, 2) @ gaussian(1, 2, 64)}
    curves = {name: budget.curves(w, 64) for name, w in tensors.items()}

    def predicted(plan):
        total, size = 0.0, 0
        for name, (bits, rank) in plan.items():
            curve = next(c for c in curves[name] if c.bits == bits)
            total += curve.error - float(curve.gains_ER[0, :rank].sum())
            size += curve.base_bytes + rank * curve.rank_bytes
        return total, size

    for max_bytes in (2600, 3000, 3400, 4000):
        every = itertools.product(itertools.product((2, 3, 4), range(33)), repeat=2)
        best = min(error for error, size in map(predicted, ({"a": a, "b": b} for a, b in every)) if size <= max_bytes)
        plan = budget.allocate(curves, max_bytes)
        error, size = predicted({name: (t.bits, t.ranks[0]) for name, t in plan.items()})
        assert size <= max_bytes
        assert error <= 1.15 * best, max_bytes  # the hull: between two corners a mixture would be needed


def test_frequent_experts_get_more_of_a_budget():
    w = gaussian(4, 64, 64)
    equal = budget.allocate({"w": budget.curves(w, 64)}, int(3.9 * w.numel() / 8))["w"].ranks
    skewed = budget.allocate({"w": budget.curves(w, 64, weights=[10, 1, 1, 1])}, int(3.9 * w.numel() / 8))["w"].ranks
    assert skewed[0] > max(equal) and sum(skewed) == sum(equal)
