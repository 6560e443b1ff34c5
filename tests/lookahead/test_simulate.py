"""The shipped core on the virtual clock against closed forms, where these hold and where they do not."""

from __future__ import annotations

import asyncio

import pytest

from rl_accel.errors import ConfigError
from rl_accel.lookahead import clock, formulas, simulate
from rl_accel.lookahead.simulate import Script

STEPS = 1200


def test_time_passes_only_where_everybody_sleeps() -> None:
    async def both():
        return await asyncio.gather(asyncio.sleep(2, "a"), asyncio.sleep(3, "b"))

    assert clock.run(both()) == (["a", "b"], 3.0)

    async def wait_for_ever():
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="every task waits"):
        clock.run(wait_for_ever())


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("a", [0.3, 0.6, 0.85])
def test_the_core_is_as_fast_as_its_formula(a, depth) -> None:
    """Endless chains of equal steps: within 2 %; so is what it asks of the target, but for ties of two events."""
    script = Script.draw(a, STEPS)
    for c in (0.05, 0.13, 0.27, 0.6):
        found = simulate.simulate(script, c, depth)
        assert found.speedup == pytest.approx(formulas.asynchronous(a, c, depth), rel=0.02), c
        assert found.most_target_steps <= depth
        begun = found.counts.target_steps / STEPS
        assert begun == pytest.approx(formulas.target_steps(a, c, depth), rel=0.02), c
        assert found.counts.accepted / STEPS == pytest.approx(a if depth > 1 else 0.0, abs=0.01)


def test_chains_that_end_gain_less() -> None:
    for a, c in ((0.6, 0.27), (0.85, 0.13), (0.85, 0.27)):
        depth = formulas.full_depth(c)
        endless = formulas.asynchronous(a, c, depth)
        for steps, loss in ((3, 0.85), (10, 0.95)):
            form = formulas.asynchronous(a, c, depth, steps=steps)
            found = simulate.simulate(Script.draw(a, STEPS), c, depth, steps=steps).speedup
            assert found == pytest.approx(form, rel=0.05) and form < loss * endless


def test_a_judge_and_overhead_cost_what_the_formula_says() -> None:
    for a, c in ((0.6, 0.27), (0.85, 0.6)):
        for judge in (0.1, 0.5):
            depth = formulas.full_depth(c / (1 + judge)) + 1
            found = simulate.simulate(Script.draw(a, STEPS), c, depth, judge=judge).speedup
            assert found == pytest.approx(formulas.asynchronous(a, c, depth, judge=judge), rel=0.02)
        found = simulate.simulate(Script.draw(a, STEPS), c, 8, overhead=0.2, draft_overhead=0.1).speedup
        form = formulas.asynchronous(a, c, 8, overhead=0.2, draft_overhead=0.1)
        assert found == pytest.approx(form, rel=0.02)


def test_uneven_steps_gain_less_than_the_formula_says() -> None:
    """Why there is a simulator: at a spread of .5 the formula promises 5 to 30 % more than there is."""
    for a, c in ((0.6, 0.1), (0.85, 0.1)):
        found = simulate.simulate(Script.draw(a, STEPS, spread=0.5), c, 8).speedup
        assert 0.7 < found / formulas.asynchronous(a, c, 8) < 0.97


def test_token_speculation_and_lookahead_multiply_where_only_the_target_is_sped_up() -> None:
    g = formulas.token(0.8, 0.05, 5)
    assert g == pytest.approx((1 - 0.8**5) / 0.2 / (0.95 + 0.25))
    assert formulas.over_token(0.7, 0.1, 8, g) == pytest.approx(g * formulas.asynchronous(0.7, 0.1 * g, 8))
    assert formulas.token(1.0, 0.0, 4) == 4.0 and formulas.asynchronous(0.9, 0.1, 1) == 1.0
    assert formulas.asynchronous(1.0, 0.25, 2) == pytest.approx(2.0) and formulas.full_depth(0.25) == 4


def test_the_command_says_what_to_expect(capsys) -> None:
    simulate.main(["a=0.7", "c=0.2", "steps=5"])
    out = capsys.readouterr().out
    assert "full depth 5; best of these" in out
    line = next(line for line in out.splitlines() if line.strip().startswith("8"))
    assert float(line.split()[1]) == pytest.approx(float(line.split()[2]), rel=0.06)
    simulate.main(["a=0.7", "c=0.05", "g=3"])
    assert "over g" in capsys.readouterr().out
    for bad, message in ((["a=x", "c=1"], "not a number"), (["b=1"], "unknown"), (["a=2", "c=1"], "usage")):
        with pytest.raises(ConfigError, match=message):
            simulate.main(bad)
