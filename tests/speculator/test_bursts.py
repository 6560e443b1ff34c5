"""Which steps of an engine leave traces."""

from __future__ import annotations

import itertools

from rl_accel.speculator.bursts import LITTLE_EVERY_S, LITTLE_ROWS, Bursts


def steps_of(
    bursts: Bursts, num_steps: int, step_s: float, trace_s: float, rows: int, train_share: float
) -> list[bool]:
    """Which of so many steps leave `rows` rows each, in `trace_s` seconds."""
    found, num_rows = [], 0
    for _ in range(num_steps):
        found.append(bursts.on)
        if bursts.on:
            bursts.spend(trace_s)
            num_rows += rows
        bursts.observe_step(step_s, train_share, num_rows)
    return found


def test_cheap_traces_are_always_left() -> None:
    assert all(steps_of(Bursts(0.015), 2000, 0.065, 0.9e-3, 128, 1.0))


def test_expensive_ones_keep_to_their_share_in_long_bursts() -> None:
    """Eight requests in steps of 12 ms: 0.5 ms is 4 % of each."""
    found = steps_of(Bursts(0.015), 20_000, 0.012, 0.5e-3, 8, 1.0)
    assert 0.9 * 0.015 < sum(found[2000:]) * 0.5e-3 / (18_000 * 0.012) < 1.05 * 0.015
    lengths = [len(list(steps)) for on, steps in itertools.groupby(found) if on]
    assert min(lengths[:-1]) >= 64, "a stretch of a response"
    assert found[0], "the first requests are those that a new head learns from"


def test_a_trainer_that_hardly_trains_gets_few_rows() -> None:
    found = steps_of(Bursts(0.015), int(10 * LITTLE_EVERY_S / 0.02), 0.02, 0.2e-3, 128, 0.02)
    assert sum(found) * 128 <= 10 * (LITTLE_ROWS + 128)
    assert sum(found) * 128 >= 8 * LITTLE_ROWS
    assert not any(steps_of(Bursts(0.015), 100, 0.02, 0.2e-3, LITTLE_ROWS, 0.02)[1:])
