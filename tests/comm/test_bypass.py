"""The choice between quantized and plain: a world of one rank, where the all-reduce is the identity."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from rl_accel.comm.bypass import FIRST_PERIOD, LONGEST_PERIOD, TRIES, WARM_UP, Bypass


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def run(bypass: Bypass, group, steps: int, quantized_s: float, plain_s: float) -> list[bool]:
    choices = []
    for _ in range(steps):
        choices.append(bypass.quantized)
        bypass.end_step(quantized_s if bypass.quantized else plain_s, group)
    return choices


def test_the_faster_way_is_kept(group):
    for quantized_s, plain_s in ((1.0, 2.0), (2.0, 1.0)):
        bypass = Bypass()
        choices = run(bypass, group, 50, quantized_s, plain_s)
        tries = choices[WARM_UP : WARM_UP + 2 * TRIES]
        assert choices[:WARM_UP] == [True] * WARM_UP
        assert sorted(tries) == [False] * TRIES + [True] * TRIES
        assert choices[WARM_UP + 2 * TRIES :] == [quantized_s < plain_s] * (50 - WARM_UP - 2 * TRIES)
        assert (bypass.quantized_s, bypass.plain_s) == (quantized_s, plain_s)


def test_a_link_that_slows_down_is_noticed(group):
    bypass = Bypass()
    run(bypass, group, 40, 2.0, 1.0)
    assert not bypass.quantized
    run(bypass, group, FIRST_PERIOD + 20, 2.0, 9.0)
    assert bypass.quantized


def test_tries_become_rare(group):
    bypass = Bypass()
    choices = run(bypass, group, 20_000, 1.0, 2.0)
    assert bypass.period == LONGEST_PERIOD
    assert choices.count(False) < 12 * TRIES


def test_one_slow_step_decides_nothing(group):
    bypass = Bypass()
    for step in range(40):
        seconds = 1.0 if bypass.quantized else 2.0
        bypass.end_step(50.0 if step == WARM_UP else seconds, group)
    assert bypass.quantized


def test_switched_off_it_never_tries(group):
    assert all(run(Bypass(enabled=False), group, 100, 9.0, 1.0))


def test_state_goes_through_a_checkpoint(group):
    whole, first = Bypass(), Bypass()
    expected = run(whole, group, 300, 2.0, 1.0)
    before = run(first, group, 100, 2.0, 1.0)
    second = Bypass()
    second.load_state_dict(first.state_dict())
    assert before + run(second, group, 200, 2.0, 1.0) == expected


def test_steps_that_send_nothing_are_no_tries(group):
    """A search for the loss scale skips optimizer steps, which then send no weights: seconds of nothing decide
    nothing, and the choice waits for steps that send."""
    bypass = Bypass()
    for _ in range(40):
        bypass.end_step(None, group)
    assert bypass.quantized
    assert bypass.gain is None
    choices = run(bypass, group, 30, 2.0, 1.0)
    assert (bypass.quantized_s, bypass.plain_s) == (2.0, 1.0)
    assert choices[2 * TRIES :] == [False] * (30 - 2 * TRIES)


def test_a_clock_that_did_not_tick_is_no_division_by_zero(group):
    for times in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0)):
        bypass = Bypass()
        run(bypass, group, 20, *times)
        assert bypass.gain is not None and 0 < bypass.gain < float("inf")
