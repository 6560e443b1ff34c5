"""The switch on a virtual clock: engines with and without something to spare, and engines that change."""

from __future__ import annotations

import asyncio
import logging

import pytest

from rl_accel.lookahead import clock
from rl_accel.lookahead.core import Limits, Lookahead
from rl_accel.lookahead.switch import Switch
from rl_accel.lookahead.verify import Exact

from .models import HashModel

TOKENS = 60


class SharedModel(HashModel):
    """An engine with so many cores: a step takes longer with more requests than that."""

    def __init__(self, cores: int, wrong: float = 0.0, seconds: float = 0.1):
        super().__init__(0, wrong)
        self.cores, self.base = cores, seconds

    @property
    def seconds(self) -> float:
        return self.base * max(1.0, self.running / self.cores)

    @seconds.setter
    def seconds(self, value: float) -> None:
        pass


async def serve(switch: Switch, target, draft, number: int) -> tuple[bool, float]:
    text = switch.begin()
    now = asyncio.get_running_loop().time
    started, tokens = now(), 0
    core = Lookahead(target, draft, Exact(), Limits(TOKENS), text.depth, counts=text.counts)
    async for final in core.steps((number,)):
        tokens += len(final.step.token_ids)
    text.end(tokens, now() - started)
    return text.drafts, now() - started


def workload(switch: Switch, target, draft, at_a_time: int, rounds: int) -> list[list[tuple[bool, float]]]:
    async def run():
        return [
            await asyncio.gather(*(serve(switch, target, draft, 100 * r + i) for i in range(at_a_time)))
            for r in range(rounds)
        ]

    return clock.run(run())[0]


def test_drafts_are_used_where_the_engine_has_cores_to_spare() -> None:
    switch, target, draft = Switch(4), SharedModel(8), HashModel(0, seconds=0.01)
    found = workload(switch, target, draft, 1, 40)
    late = [drafts for ((drafts, _),) in found[10:]]
    assert sum(late) >= 0.9 * len(late)
    assert switch.gains()[1] > 1.5


def test_above_the_crossover_nearly_nobody_gets_drafts() -> None:
    """Two cores, eight texts: every extra step slows everybody down; the whole is within 3 % of plain."""
    plain = workload(Switch(1), SharedModel(2), HashModel(0), 8, 60)
    switch, target, draft = Switch(4), SharedModel(2, wrong=0.0), HashModel(0, wrong=0.1, seconds=0.01)
    found = workload(switch, target, draft, 8, 60)
    late = [drafts for texts in found[20:] for drafts, _ in texts]
    assert sum(late) / len(late) < 0.1
    mean = [sum(s for texts in run[20:] for _, s in texts) for run in (found, plain)]
    assert mean[0] / mean[1] < 1.03


def test_it_notices_that_things_have_changed() -> None:
    switch, target, draft = Switch(4), SharedModel(8), HashModel(0, seconds=0.01)
    workload(switch, target, draft, 1, 20)
    assert switch.gains()[1] > 1.5
    draft.wrong, target.cores = 1.0, 1  # never right, and every extra step is paid
    found = workload(switch, target, draft, 1, 400)
    assert sum(drafts for ((drafts, _),) in found[200:]) < 20


def test_depth_follows_the_ratio_of_steps() -> None:
    for seconds, depth in ((0.001, 8), (0.03, 4), (0.09, 2)):
        switch = Switch(8, always=True)
        workload(switch, HashModel(), HashModel(seconds=seconds), 1, 12)
        assert switch.begin().depth() == depth, seconds


def test_cancelled_texts_and_lost_drafts_teach_nothing() -> None:
    switch = Switch(4)
    for _ in range(50):
        switch.begin().end(0, 5.0)
    assert switch.active == 0 and switch.gains() == {}
    workload(switch, HashModel(), HashModel(fails_at=0), 1, 1)
    text = switch.begin()
    text.counts.drafts_lost = 1
    text.end(10, 1.0)
    text.end(10, 1.0)
    assert switch.active == 0 and switch.gains() == {}


def test_a_draft_engine_that_goes_and_comes_back_is_said_once_each(caplog) -> None:
    switch = Switch(4, always=True)
    workload(switch, HashModel(), HashModel(), 2, 2)
    for _ in range(3):
        workload(switch, HashModel(), HashModel(fails_at=0), 1, 1)
    workload(switch, HashModel(), HashModel(), 2, 2)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 2 and "the engine is gone" in said[0] and "back" in said[1]


def test_a_depth_of_1_is_off() -> None:
    switch = Switch(1)
    assert not any(switch.begin().drafts for _ in range(20))
    with pytest.raises(ValueError, match="at least 1"):
        Switch(0)
