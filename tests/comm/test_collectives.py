"""The quantized collectives on 1 to 4 real gloo processes."""

from __future__ import annotations

from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("collective_ranks.py")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_collectives_equal_a_naive_simulation(run_ranks, world_size):
    """Sums bit for bit, bytes, unbiased rounding, NaN and infinity, replicas, both backends: see the script."""
    shapes = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 3: [(3, 1)], 4: [(4, 1), (2, 2), (1, 4)]}
    for result in run_ranks(SCRIPT, world_size):
        assert result["shapes"] == shapes[world_size]


def test_a_rank_that_dies_is_an_error_on_the_others(run_ranks):
    codes, logs = run_ranks(SCRIPT, 4, "die", timeout=90, expect_failure=True)
    assert codes[1] == 7
    assert all(code not in (0, -9) for code in codes), logs
