"""Lookahead decoding on a virtual clock: the answer, what is asked of engines, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_accel.lookahead import clock
from rl_accel.lookahead.core import Counts, Limits, Lookahead
from rl_accel.lookahead.step import Step
from rl_accel.lookahead.verify import Always, Exact, Numbers, Random

from .models import END_TOKEN, HashModel, plain

PROMPT = (1, 2, 3)


def decode(target, draft, verifier=None, *, max_tokens=120, step_tokens=50, depth=4, **options):
    """Return steps, counts and simulated seconds; every request must have ended."""
    counts = Counts()
    core = Lookahead(
        target, draft, verifier or Exact(), Limits(max_tokens, step_tokens), lambda: depth, counts=counts, **options
    )

    async def run():
        found = [final async for final in core.steps(PROMPT)]
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others, others
        return found

    steps, seconds = clock.run(run())
    assert target.running == draft.running == 0
    return steps, counts, seconds


def long_text(num_tokens: int, start: int = 0) -> int:
    """Return a seed whose text does not end before that."""
    return next(
        seed for seed in itertools.count(start) if len(plain(HashModel(seed), PROMPT, num_tokens)) == num_tokens
    )


SEED = long_text(500)


def tokens(steps) -> list[int]:
    return [token for final in steps for token in final.step.token_ids]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    wrong=st.sampled_from([0.0, 0.02, 0.1, 1.0]),
    speed=st.sampled_from([0.01, 0.3, 1.0, 5.0]),
    depth=st.integers(1, 6),
    width=st.integers(1, 3),
    hint=st.booleans(),
    max_tokens=st.integers(1, 90),
    step_tokens=st.integers(1, 20),
)
def test_exact_gives_the_targets_own_text(seed, wrong, speed, depth, width, hint, max_tokens, step_tokens) -> None:
    target, draft = HashModel(seed), HashModel(seed, wrong, 0.1 * speed)
    found, _, _ = decode(
        target, draft, max_tokens=max_tokens, step_tokens=step_tokens, depth=depth, width=width, hint=hint
    )
    assert tokens(found) == plain(target, PROMPT, max_tokens)


def test_at_depth_1_nothing_is_asked_of_the_draft() -> None:
    target, draft = HashModel(SEED), HashModel(SEED)
    found, counts, _ = decode(target, draft, depth=1)
    assert not draft.asked and counts.draft_steps == counts.compared == 0
    assert len(target.asked) == len(found) == counts.target_steps and target.most_running == 1


def test_a_draft_that_is_the_target_is_accepted_always() -> None:
    target, draft = HashModel(SEED), HashModel(SEED, seconds=0.001)
    found, counts, seconds = decode(target, draft, max_tokens=400, depth=4)
    assert counts.accepted == counts.compared == len(found) - 1, "the last one is cut by the limit"
    assert all(final.from_draft for final in found[:-1])
    assert len(target.asked) == len(set(target.asked)), "no step was written twice"
    alone = decode(HashModel(SEED), draft, max_tokens=400, depth=1)[2]
    assert alone / seconds > 1.9 and target.most_running == 4


def test_a_draft_that_is_never_right_costs_no_time() -> None:
    target, draft = HashModel(SEED), HashModel(SEED, wrong=1.0, seconds=0.01)
    found, counts, seconds = decode(target, draft, max_tokens=200)
    assert not any(final.from_draft for final in found) and counts.accepted == 0 < counts.compared
    assert seconds == pytest.approx(decode(HashModel(SEED), draft, max_tokens=200, depth=1)[2])


def test_a_late_draft_is_a_mismatch() -> None:
    target, draft = HashModel(SEED), HashModel(SEED, seconds=10.0)
    found, counts, seconds = decode(target, draft, max_tokens=60)
    whole = sum(final.step.whole for final in found)
    assert counts.late_drafts == counts.compared == whole > 5 and counts.accepted == 0
    assert seconds == pytest.approx(decode(HashModel(SEED), draft, max_tokens=60, depth=1)[2])


def test_what_was_cut_is_never_accepted() -> None:
    """A step of 3 tokens at most: drafts agree word for word, and only those that are whole count."""
    target, draft = HashModel(SEED), HashModel(SEED, seconds=0.001)
    found, _, _ = decode(target, draft, step_tokens=3)
    assert {final.from_draft for final in found if not final.step.whole} == {False}
    assert any(final.from_draft for final in found)
    assert tokens(found) == plain(target, PROMPT, 120)


def test_the_end_of_a_text_may_come_from_a_draft() -> None:
    seed = next(s for s in itertools.count() if plain(HashModel(s), PROMPT, 100)[-1] == END_TOKEN)
    target, draft = HashModel(seed), HashModel(seed, seconds=0.001)
    found, _, _ = decode(target, draft, max_tokens=100)
    assert found[-1].step.end and found[-1].from_draft
    assert tokens(found) == plain(target, PROMPT, 100)
    assert all(END_TOKEN not in ids for ids in target.asked), "nothing was asked behind the end"


def test_an_end_does_not_stand_for_a_step() -> None:
    """A verifier may find them alike; the text would go on, or not."""
    target, draft = HashModel(3), HashModel(3, wrong=0.3, seconds=0.001)
    found, _, _ = decode(target, draft, Always(), max_tokens=300)
    for final in found:
        assert final.step.end == (final.step.token_ids[-1] == END_TOKEN)
    assert sum(final.step.end for final in found) <= 1


def test_closing_the_generator_cancels_everything() -> None:
    target, draft = HashModel(SEED), HashModel(SEED, wrong=0.1, seconds=0.01)

    async def leave_after(count: int) -> None:
        steps = Lookahead(target, draft, Exact(), Limits(500), lambda: 5, width=2).steps(PROMPT)
        for _ in range(count):
            await anext(steps)
        await steps.aclose()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert target.running == draft.running == 0

    for count in range(12):
        clock.run(leave_after(count))


def test_a_cancelled_caller_cancels_everything() -> None:
    target, draft = HashModel(SEED), HashModel(SEED, wrong=0.1, seconds=0.01)

    async def read() -> None:
        async for _ in Lookahead(target, draft, Exact(), Limits(500), lambda: 5).steps(PROMPT):
            pass

    async def run(seconds: float) -> None:
        task = asyncio.create_task(read())
        await asyncio.sleep(seconds)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() and asyncio.all_tasks() == {asyncio.current_task()}
        assert target.running == draft.running == 0

    for seconds in (0.0, 0.005, 0.3, 1.7, 4.0):
        clock.run(run(seconds))


@pytest.mark.parametrize("fails_at", [0, 1, 7])
def test_a_lost_draft_engine_is_plain_decoding(fails_at) -> None:
    target, draft = HashModel(SEED), HashModel(SEED, seconds=0.001, fails_at=fails_at)
    found, counts, _ = decode(target, draft, max_tokens=200)
    assert tokens(found) == plain(target, PROMPT, 200)
    assert counts.drafts_lost == 1 and len(draft.asked) == fails_at + 1
    assert counts.draft_error == "ConnectionError: the engine is gone"


def test_a_lost_draft_engine_leaves_no_target_waiting_for_a_hint() -> None:
    target, draft = HashModel(SEED), HashModel(SEED, seconds=0.001, fails_at=3)
    found, _, _ = decode(target, draft, max_tokens=200, hint=True)
    assert tokens(found) == plain(target, PROMPT, 200)


@pytest.mark.parametrize("fails_at", [0, 5])
def test_a_failure_of_the_target_is_raised_and_nothing_is_left(fails_at) -> None:
    target, draft = HashModel(SEED, fails_at=fails_at), HashModel(SEED, seconds=0.001)
    with pytest.raises(ConnectionError, match="gone"):
        decode(target, draft, max_tokens=200)
    assert target.running == draft.running == 0


def test_hints_are_the_draft_of_the_same_step() -> None:
    target, draft = HashModel(SEED), HashModel(SEED, seconds=0.001)
    decode(target, draft, max_tokens=200, hint=True)
    written = {ids: ids for ids in draft.asked}
    for ids, hint in zip(target.asked, target.hints, strict=True):
        assert hint and (*ids, *hint) == (*ids, *plain(draft, ids, len(hint))) and ids in written


def test_another_draft_of_the_next_step_is_taken_up_where_the_target_already_goes_on() -> None:
    target, draft = HashModel(SEED), HashModel(SEED, wrong=0.1, seconds=0.001)
    counts = {width: decode(target, draft, max_tokens=400, width=width) for width in (1, 2, 3)}
    assert counts[1][1].accepted < counts[2][1].accepted < counts[3][1].accepted
    assert counts[3][2] < counts[2][2] < counts[1][2], "simulated seconds"


@pytest.mark.parametrize("hint", [False, True])
def test_drafting_stops_when_it_is_switched_off_and_comes_back(hint) -> None:
    """Depth is asked again and again: it falls to 1 in the middle of a text."""
    target, draft = HashModel(SEED), HashModel(SEED, wrong=0.05, seconds=0.001)
    depths = itertools.chain([4] * 30, [1] * 30, itertools.repeat(4))
    core = Lookahead(target, draft, Exact(), Limits(400), lambda: next(depths), hint=hint)

    async def run():
        return [final async for final in core.steps(PROMPT)]

    found, _ = clock.run(run())
    assert tokens(found) == plain(target, PROMPT, 400)
    kinds = [final.from_draft for final in found]
    assert True in kinds[:5] and True in kinds[-5:]


def test_a_depth_that_jumps_leaves_no_target_waiting_for_a_hint() -> None:
    """On the virtual clock a task that waits for ever is an error."""
    for seed in range(60):
        generator = random.Random(seed)
        target, draft = HashModel(seed), HashModel(seed, wrong=0.02, seconds=0.03)
        core = Lookahead(target, draft, Exact(), Limits(100), lambda g=generator: g.choice((1, 3, 4)), hint=True)

        async def run(core=core):
            return [final async for final in core.steps(PROMPT)]

        assert tokens(clock.run(run())[0]) == plain(target, PROMPT, 100)


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Limits(0)


def test_the_answer_of_a_lossy_verifier_holds_the_drafts_words() -> None:
    target, draft = HashModel(SEED), HashModel(SEED, wrong=0.1, seconds=0.001)
    found, counts, _ = decode(target, draft, Random(0.5, seed=1), max_tokens=300)
    assert tokens(found) != plain(target, PROMPT, 300)
    assert 0.3 < counts.accepted / counts.compared < 0.7
    assert not (Always.lossless or Random.lossless or Numbers.lossless) and Exact.lossless


def test_numbers_are_compared_as_they_are_written() -> None:
    texts = {1: "3 + 4 = 7.\n", 2: "So 3 and 4 make 7 .\n", 3: "4 + 3 = 7.\n", 4: "1,200 in all", 5: "1200 then"}
    verifier = Numbers(lambda ids: texts[ids[0]])

    async def agree(a: int, b: int) -> bool:
        return await verifier.agree((), Step((a,)), Step((b,)))

    found = {(a, b): clock.run(agree(a, b))[0] for a, b in ((1, 2), (1, 3), (4, 5), (1, 4))}
    assert found == {(1, 2): True, (1, 3): False, (4, 5): True, (1, 4): False}
