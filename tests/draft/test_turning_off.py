"""Drafting that is not worth its cost: all or nothing by the break-even gain, and an index that backs off meanwhile."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rl_accel.draft.config import DraftConfig
from rl_accel.draft.drafter import BACK_OFF_AFTER, BACK_OFF_CALLS, RESUME_CALLS, SuffixDrafter
from rl_accel.draft.planner import UNDRAFTED_EVERY, Planner
from rl_accel.kernels.suffix.api import NO_CAPTURE_SIZES, SuffixIndex, problem_key

TEXT = [int(t) for t in np.random.default_rng(0).integers(10, 5000, 200)]
STOP = 2


def known_index() -> tuple[SuffixIndex, list[int]]:
    """Two requests behind 20 tokens of a text that the index has seen."""
    index = SuffixIndex(max_draft=8, cross_tokens=0)
    key = problem_key("p")
    first = index.begin(key, [1])
    ask(index, [first], [TEXT])
    index.end(first)
    handles = [index.begin(key, [1]) for _ in range(2)]
    ask(index, handles, [TEXT[:20]] * 2)
    return index, handles


def ask(index, handles, rows, threshold=0.1, break_even_gain=0.0):
    n = len(handles)
    offsets = np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.uint32)
    tokens = np.array([t for row in rows for t in row], np.int32)
    max_draft_tokens, min_path_probs = np.full(n, 8, np.uint32), np.full(n, threshold, np.float32)
    return index.propose_batch(
        np.array(handles, np.int64),
        tokens,
        offsets,
        max_draft_tokens,
        min_path_probs,
        NO_CAPTURE_SIZES,
        break_even_gain,
    )


def test_the_fee_is_paid_by_all_drafts_together_or_there_are_none() -> None:
    """Both sides of the bound: the gains are sum(path / threshold - 1) over all that would be drafted."""
    index, handles = known_index()
    *_, paths = ask(index, handles, [TEXT[20:21]] * 2)
    gain = float((paths.astype(np.float64) / np.float32(0.1) - 1.0).sum())
    assert len(paths) == 16 and gain > 16.0
    for position, (share, drafted) in enumerate([(0.95, 16), (1.05, 0), (0.0, 16), (math.inf, 0)]):
        index, handles = known_index()
        tokens, ends, _ = ask(index, handles, [TEXT[20:21]] * 2, break_even_gain=share * gain if share else 0.0)
        assert len(tokens) == drafted == ends[-1], position


def test_what_is_not_drafted_for_the_fee_is_learned_from() -> None:
    index, handles = known_index()
    ask(index, handles, [TEXT[20:21]] * 2, break_even_gain=math.inf)
    index.take_stats()
    before = index.scoring_state()
    ask(index, handles, [TEXT[21:24]] * 2, break_even_gain=math.inf)
    stats = index.take_stats()
    assert stats["candidates"] > 0 and stats["expected_first"] > 0.5
    assert not stats["by_source"], "nothing was drafted"
    assert index.scoring_state().sum() > before.sum() + 6


def fed(speculation: float, policy: str = "budget") -> Planner:
    planner, rng = Planner(policy, 16), np.random.default_rng(0)
    for _ in range(600):
        n, d = int(rng.integers(1, 64)), int(rng.integers(0, 2)) * int(rng.integers(1, 200))
        planner.observe_step(0.005 + 1e-4 * n + 5e-5 * d + speculation * (d > 0), n, d)
    n = np.arange(40)
    planner.plan(n, np.full(40, 5), np.full(40, 100))
    return planner


def test_the_fee_is_the_price_of_speculating_in_draft_tokens() -> None:
    assert fed(2e-3).next_break_even_gain() == pytest.approx(2e-3 / 5e-5, rel=0.1)
    assert fed(0.0).next_break_even_gain() < 1.0
    for policy in ("fixed", "classes"):
        assert {fed(2e-3, policy).next_break_even_gain() for _ in range(2 * UNDRAFTED_EVERY)} == {0.0}


def test_one_step_in_many_has_no_drafts_whatever_they_would_gain() -> None:
    planner = fed(2e-3)
    gains = []
    for _ in range(4 * UNDRAFTED_EVERY):
        gains.append(planner.next_break_even_gain())
        planner.observe_step(0.01, 40, 0 if math.isinf(gains[-1]) else 40)
    undrafted = [i for i, break_even_gain in enumerate(gains) if math.isinf(break_even_gain)]
    assert len(undrafted) == 4 and set(np.diff(undrafted)) == {UNDRAFTED_EVERY}


class Rows:
    """Requests of a host that hands over its table of texts; what is drafted is not accepted."""

    def __init__(self, drafter: SuffixDrafter, num_requests: int, limit: int = 1000):
        self.drafter = drafter
        self.names: list[str] = []
        self.table = np.zeros((num_requests + 4, 1024), np.int32)
        self.num_tokens: list[int] = []
        for _ in range(num_requests):
            self.add(limit)

    def add(self, limit: int = 1000) -> None:
        name = f"r{len(self.names)}"
        self.drafter.begin(name, name, [1], limit)
        self.table[len(self.names), 0] = 1
        self.names.append(name)
        self.num_tokens.append(1)

    def one_pass(self, tokens: list[int]) -> list[list[int]]:
        for row, token in enumerate(tokens):
            self.table[row, self.num_tokens[row]] = token
            self.num_tokens[row] += 1
        rows = np.arange(len(self.names), dtype=np.uint32)
        return self.drafter.propose_rows(self.names, self.table, rows, np.array(self.num_tokens, np.uint32))

    def taken(self) -> int:
        """Tokens that the index has, prompts included."""
        return self.drafter.index.live_tokens()


def sleeping(num_requests: int = 2, limit: int = 1000) -> tuple[Rows, np.random.Generator]:
    drafter = SuffixDrafter(DraftConfig(method="das", cross_problems=False), stop_token_ids=[STOP])
    rows, rng = Rows(drafter, num_requests, limit), np.random.default_rng(0)
    while drafter._idle_calls < BACK_OFF_AFTER:  # what never repeats is never drafted
        assert not any(rows.one_pass(rng.integers(10**6, 10**9, num_requests).tolist()))
    return rows, rng


def test_an_index_that_drafts_nothing_is_asked_rarely_and_misses_no_token() -> None:
    rows, rng = sleeping()
    had = rows.taken()
    history = []
    for _ in range(2 * BACK_OFF_CALLS):
        rows.one_pass(rng.integers(10**6, 10**9, 2).tolist())
        history.append(rows.taken())
    steps = np.diff([had, *history])
    assert sorted(set(steps.tolist())) == [0, 2 * BACK_OFF_CALLS]
    assert (steps > 0).sum() == 2
    rows.drafter.index.check_integrity()


def test_a_request_that_ends_asleep_is_taken_whole() -> None:
    rows, rng = sleeping()
    for _ in range(3):
        rows.one_pass(rng.integers(10**6, 10**9, 2).tolist())
    rows.one_pass([STOP, 77])
    rows.drafter.end("r0")
    info = rows.drafter.close_epoch(0)
    assert info["num_tokens"] == rows.num_tokens[0] - 1, "all but the prompt, the stop token too"


def test_a_request_that_meets_its_limit_asleep_is_taken_whole() -> None:
    rows, rng = sleeping(limit=BACK_OFF_AFTER + 3)
    while rows.num_tokens[0] - 1 < BACK_OFF_AFTER + 3:
        rows.one_pass(rng.integers(10**6, 10**9, 2).tolist())
    assert rows.taken() == sum(rows.num_tokens)


def test_a_new_request_wakes_the_index_for_a_while() -> None:
    rows, rng = sleeping()
    rows.add()
    had = rows.taken()
    for _ in range(RESUME_CALLS):
        rows.one_pass(rng.integers(10**6, 10**9, 3).tolist())
        assert rows.taken() >= had + 3
        had = rows.taken()


@pytest.mark.parametrize("seed", [0, 1])
def test_drafts_that_became_cheap_wake_the_index(seed) -> None:
    """Too expensive at first; the probes that notice the new cost come while the index backs off."""
    rows, rng = Rows(SuffixDrafter(DraftConfig(method="das", cross_problems=False)), 2), np.random.default_rng(seed)

    def some_steps(count: int, per_draft_s: float) -> list[int]:
        sizes = []
        for _ in range(count):
            drafted = sum(map(len, rows.one_pass([TEXT[sum(rows.num_tokens) // 2 % 9]] * 2)))
            seconds = (0.01 + per_draft_s * drafted) * (1.0 + 0.03 * rng.standard_normal())
            rows.drafter.observe_step(seconds, 2, drafted)
            sizes.append(drafted)
        return sizes

    expensive = some_steps(500, per_draft_s=0.1)
    assert np.mean(np.array(expensive[-200:]) > 0) < 0.2 and rows.drafter._idle_calls > 0
    cheap = some_steps(450, per_draft_s=1e-5)
    assert np.mean(np.array(cheap[-60:]) > 0) > 0.9


def test_text_that_repeats_wakes_the_index() -> None:
    rows, _ = sleeping()
    drafts = [rows.one_pass([TEXT[i % 10], TEXT[i % 7]]) for i in range(60)]
    assert all(any(d) for d in drafts[-20:])
