"""History and another source together: who drafts, and that nobody is asked who is not worth it."""

from __future__ import annotations

import time

import numpy as np
import pytest

from rl_accel.draft.combined import (
    FIRST_CALLS,
    FIRST_PROBE,
    PROBE_ROWS,
    PROBE_TOKENS,
    RETRY_EVERY,
    CombinedDrafter,
)
from rl_accel.draft.config import DraftConfig

STOP = 7


class Oracle:
    """Knows how each text goes on and says so with a fixed probability a token."""

    ready = present = True

    def __init__(self, texts: list[list[int]], probability: float = 0.9, seconds: float = 0.0):
        self.texts, self.probability, self.seconds = texts, probability, seconds
        self.name = "head"
        self.asked: list[list[int]] = []
        self.seen: list[tuple] = []
        self.steps: list[tuple] = []

    def candidates(self, rows_N, num_tokens_N, token_ids, max_draft_tokens_N, min_path_probs_N, min_step_gain):
        self.asked.append(rows_N.tolist())
        time.sleep(self.seconds)
        k = int(max_draft_tokens_N.max())
        drafts = np.zeros((len(rows_N), k), np.int64)
        for i, (row, n) in enumerate(zip(rows_N, num_tokens_N, strict=True)):
            rest = self.texts[row][n : n + k]
            drafts[i, : len(rest)] = rest
        return drafts, np.repeat(self.probability ** np.arange(1, k + 1)[None], len(rows_N), 0).astype(np.float32)

    def chain_seconds(self, num_rows: int) -> float:
        return self.seconds

    def observe(self, *counts) -> None:
        self.seen.append(counts)

    def observe_step(self, *times) -> None:
        self.steps.append(times)


def texts_of(num: int, length: int = 60, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[5, 6, *rng.integers(10, 400, length).tolist()] for _ in range(num)]


class Loop:
    """What an engine does with drafts: accept the common prefix, and add a token."""

    def __init__(self, drafter: CombinedDrafter, texts: list[list[int]], problem: str = "p"):
        self.drafter, self.texts = drafter, texts
        self.matrix = np.zeros((len(texts), 256), np.int32)
        self.names = [f"{problem}-{i}" for i in range(len(texts))]
        self.lengths = np.full(len(texts), 3, np.uint32)
        for i, text in enumerate(texts):
            self.matrix[i, : len(text)] = text
            drafter.begin(self.names[i], f"{problem}{i}", text[:2], max_tokens=240)

    def step(self) -> list[list[int]]:
        rows = np.arange(len(self.texts), dtype=np.uint32)
        drafts = self.drafter.propose_rows(self.names, self.matrix, rows, self.lengths)
        for i, draft in enumerate(drafts):
            n = int(self.lengths[i])
            accepted = 0
            rest = self.texts[i][n:]
            while accepted < min(len(draft), len(rest)) and draft[accepted] == rest[accepted]:
                accepted += 1
            self.lengths[i] = min(n + accepted + 1, len(self.texts[i]))
        return drafts


def drafter_of(source, method: str, **settings) -> CombinedDrafter:
    return CombinedDrafter(DraftConfig(method=method, **settings), source, stop_token_ids=[STOP])


@pytest.mark.parametrize("method", ["head", "auto"])
def test_where_history_says_nothing_the_source_drafts(method: str) -> None:
    texts = texts_of(3)
    source = Oracle(texts)
    loop = Loop(drafter_of(source, method, num_speculative_tokens=5, policy="fixed"), texts)
    for _ in range(6):
        drafts = loop.step()
        assert all(draft == text[n - 6 : n - 1] for draft, text, n in zip(drafts, texts, loop.lengths, strict=True))
    paths, lengths, accepted = source.seen[-1]
    assert lengths.tolist() == accepted.tolist() == [5, 5, 5]
    np.testing.assert_allclose(paths, [[0.9**k for k in range(1, 6)]] * 3, rtol=1e-4)
    served = loop.drafter.take_source_stats()[("head", "0")]
    assert served[1] == served[2] == 15 * 5


def test_history_drafts_where_it_knows_better() -> None:
    """The second time the texts are known; the source is less sure of itself and stays silent."""
    texts = texts_of(3)
    source = Oracle(texts, probability=0.3)
    drafter = drafter_of(source, "auto", num_speculative_tokens=5, policy="fixed")
    for epoch in range(3):
        loop = Loop(drafter, texts, f"{epoch}-")
        for name, i in zip(loop.names, range(3), strict=True):
            drafter.end(name, keep=False)
            drafter.begin(name, f"known{i}", texts[i][:2], max_tokens=80)
        for _ in range(20):
            loop.step()
        for name in loop.names:
            drafter.end(name)
        drafter.close_epoch(epoch)
        stats = drafter.take_source_stats()
        by_history = sum(accepted for (kind, _), (_, _, accepted) in stats.items() if kind != "head")
        by_source = stats[("head", "0")][2]
    assert by_history > 5 * by_source


def test_limits_and_stop_tokens_hold() -> None:
    texts = texts_of(2)
    texts[0][8] = STOP
    loop = Loop(drafter_of(Oracle(texts), "head", num_speculative_tokens=10, policy="fixed"), texts)
    drafts = loop.step()
    assert drafts[0] == texts[0][3:9], "nothing is drafted behind a stop token"
    assert len(drafts[1]) == 10
    short = drafter_of(Oracle(texts), "head", num_speculative_tokens=10, policy="fixed")
    short.begin("r", "p", texts[1][:2], max_tokens=4)
    matrix = np.array([texts[1]], np.int32)
    (draft,) = short.propose_rows(["r"], matrix, np.zeros(1, np.uint32), np.array([3], np.uint32))
    assert len(draft) == 2, "a place is left for the token that the target adds"


def teach(drafter: CombinedDrafter, per_draft_s: float) -> None:
    for i in range(300):
        n, d = 1 + i % 8, (i % 2) * (1 + i % 7)
        drafter.planner.observe_step(0.01 + 1e-4 * n + per_draft_s * d, n, d)


def test_a_source_that_costs_more_than_it_brings_is_hardly_asked() -> None:
    """Its time is charged; now and then it is tried again."""
    texts = texts_of(2, length=120)
    source = Oracle(texts, probability=0.5, seconds=0.02)
    drafter = drafter_of(source, "head", num_speculative_tokens=2, policy="budget")
    teach(drafter, 1e-4)
    loop = Loop(drafter, texts)
    rows = np.arange(2, dtype=np.uint32)
    for _ in range(FIRST_CALLS + 3 * RETRY_EVERY):
        drafter.propose_rows(loop.names, loop.matrix, rows, loop.lengths)
    assert FIRST_CALLS - 8 <= len(source.asked) <= FIRST_CALLS + 4


def test_a_source_is_not_judged_before_costs_are_known() -> None:
    """Until then drafts are short and their gain is counted in a cost that nobody has measured: a source that takes
    3 ms of 30 was not asked in 63 of 98 steps with one request."""
    texts = texts_of(1, length=124)
    source = Oracle(texts, seconds=0.003)
    drafter = drafter_of(source, "head", num_speculative_tokens=6, policy="budget")
    drafter.begin("r", "p", texts[0][:2], max_tokens=200)
    matrix, num_drafted = np.array(texts, np.int32), []
    for i in range(116):
        (draft,) = drafter.propose_rows(["r"], matrix, np.zeros(1, np.uint32), np.array([3 + i], np.uint32))
        num_drafted.append(len(draft))
        drafter.observe_step(0.027 + 4e-4 * (1 + len(draft)) + drafter.last_source_s, 1, len(draft))
    assert sum(n == 0 for n in num_drafted) <= 4


@pytest.mark.parametrize("method", ["head", "auto"])
def test_the_cost_of_a_draft_token_is_learned_though_nobody_has_a_draft(method: str) -> None:
    """A source that has learned nothing is not asked, and history is silent: a few drafts are made all the same."""
    texts, wrong = texts_of(12, length=200), texts_of(12, length=240, seed=1)
    source = Oracle(wrong)
    source.ready = False
    drafter = drafter_of(source, method, num_speculative_tokens=6, policy="budget")
    loop, num_drafted = Loop(drafter, texts), []
    for _ in range(100):
        drafts, num_asked = loop.step(), len(source.asked)
        num_drafted.append(sum(map(len, drafts)))
        if method == "head":
            assert sum(map(bool, drafts)) <= PROBE_ROWS and max(map(len, drafts)) <= PROBE_TOKENS
        drafter.observe_step(0.02 + 1e-4 * (12 + num_drafted[-1]), 12, num_drafted[-1])
    cost = drafter.planner.cost
    assert drafter.planner.cost_is_known and cost.per_draft_s == pytest.approx(1e-4, rel=0.3)
    assert num_asked >= 16 and not source.seen, "what nobody promised is not counted"
    assert source.steps[-1][4] is not None
    if method == "head":
        assert not any(num_drafted[:FIRST_PROBE]) and not any(num_drafted[-20:]), "and then no more"


def test_drafts_that_cost_more_than_a_step_are_not_proposed() -> None:
    texts = texts_of(4)
    drafter = drafter_of(Oracle(texts, probability=0.6), "head", num_speculative_tokens=4, policy="budget")
    teach(drafter, 0.05)
    loop = Loop(drafter, texts)
    assert sum(len(draft) for _ in range(20) for draft in loop.step()) <= 8


def test_times_of_steps_reach_the_source_without_its_own() -> None:
    texts = texts_of(2)
    source = Oracle(texts)
    drafter = drafter_of(source, "head", num_speculative_tokens=3, policy="fixed")
    loop = Loop(drafter, texts)
    loop.step()
    drafter.last_source_s = 0.004
    drafter.observe_step(0.010, 2, 6)
    assert source.steps[-1][:3] == (pytest.approx(0.006), 0.0, 0.0), "nothing is known of the cost yet"
    drafter.observe_step(0.001, 2, 6)  # shorter than the source alone: a clock that jumped teaches nothing
    assert len(source.steps) == 1
    teach(drafter, 1e-3)
    drafter.observe_step(0.020, 2, 6)
    assert source.steps[-1][1:3] == (pytest.approx(0.0162, rel=0.1), pytest.approx(0.01, rel=0.1))
