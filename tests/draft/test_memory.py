"""The memory of drafting history: `history_gib` holds whenever a call returns, whatever is asked of the drafter."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_accel.draft import DraftConfig, SuffixDrafter
from rl_accel.kernels.suffix.api import SuffixIndex

SOAK = int(os.environ.get("RL_ACCEL_SOAK", "1"))
PER_REQUEST = 2048
"""Bytes beside the limit for each request that ran at once."""
KIB, MIB = 2**10, 2**20
NO_TOKENS = np.zeros(0, np.int32)


def propose(index: SuffixIndex, handles: list[int], rows: list[list[int]], cap: int = 0) -> list[list[int]]:
    n = len(handles)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.uint32)
    tokens = np.concatenate([NO_TOKENS, *(np.array(row, np.int32) for row in rows)])
    max_draft_tokens, min_path_probs = np.full(n, cap, np.uint32), np.zeros(n, np.float32)
    drafts, ends, _ = index.propose_batch(
        np.array(handles, np.int64), tokens, offsets, max_draft_tokens, min_path_probs
    )
    return [drafts[ends[i] : ends[i + 1]].tolist() for i in range(n)]


def teach(index: SuffixIndex, problem: int, text: list[int]) -> None:
    handle = index.begin(problem, [1])
    for at in range(0, len(text), 200):
        propose(index, [handle], [text[at : at + 200]])
    index.end(handle)


class Schedule:
    """Random calls on an index of little memory; every answer and every byte is looked at."""

    def __init__(self, seed: int, limit: int):
        self.rng, self.limit = random.Random(seed), limit
        self.alphabet = self.rng.choice([2, 5, 300, 50_000])
        self.problems = self.rng.choice([1, 3, 20, 1000])
        cross_tokens = self.rng.choice([0, 1 << 18])
        self.index = SuffixIndex(max_bytes=limit, min_probability=1e-6, cross_tokens=cross_tokens)
        self.other = SuffixIndex(cross_tokens=0)
        self.live: list[int] = []
        self.drafts: dict[int, list[int]] = {}
        self.peak = 0

    def run(self, calls: int) -> None:
        usual = [self.begin] * 4 + [self.step] * 12 + [self.end] * 3
        actions = [*usual, self.close, self.pack, self.receive, self.share]
        for number in range(calls):
            self.rng.choice(actions)()
            held = sum(self.index.memory_bytes().values())
            assert held <= self.limit + PER_REQUEST * self.peak
            if number % 40 == 0:
                self.index.check_integrity()
        self.index.check_integrity()
        for handle in self.live:
            self.index.end(handle, self.rng.random() < 0.7)
        self.index.close_epoch(1 << 20)
        self.index.check_integrity()
        assert self.index.live_tokens() == 0

    def text(self, longest: int) -> list[int]:
        length = self.rng.choice([1, self.rng.randrange(longest), self.rng.randrange(1 + longest // 8)])
        if self.rng.random() < 0.2:
            return [self.rng.randrange(self.alphabet)] * length
        return [self.rng.randrange(self.alphabet) for _ in range(length)]

    def begin(self) -> None:
        problem = self.rng.randrange(self.problems)
        prompt = [problem] * 7 if self.rng.random() < 0.7 else self.text(self.rng.choice([20, 3000, 30_000]))
        self.live.append(self.index.begin(problem, prompt))
        self.peak = max(self.peak, len(self.live))

    def step(self) -> None:
        chosen = self.rng.sample(self.live, self.rng.randrange(len(self.live) + 1))
        longest = self.rng.choice([2, 2, 40, 4000])
        rows = [self.drafts.get(handle, [])[: self.rng.randrange(9)] + self.text(longest) for handle in chosen]
        cap = self.rng.choice([0, 1, 8])
        for handle, draft in zip(chosen, propose(self.index, chosen, rows, cap), strict=True):
            assert len(draft) <= cap and all(0 <= token < self.alphabet + 1000 for token in draft)
            self.drafts[handle] = draft

    def end(self) -> None:
        if self.live:
            handle = self.live.pop(self.rng.randrange(len(self.live)))
            self.drafts.pop(handle, None)
            self.index.end(handle, self.rng.random() < 0.8)

    def close(self) -> None:
        epoch = self.rng.randrange(9)
        self.index.close_epoch(epoch)
        if self.rng.random() < 0.3:
            self.index.drop_before(epoch - self.rng.randrange(4))

    def pack(self) -> None:
        self.index.pack()

    def receive(self) -> None:
        teach(self.other, self.rng.randrange(self.problems), [1, *self.text(20_000)])
        self.other.close_epoch(self.rng.randrange(9))
        if segment := self.other.take_unshared():  # none where it made the same one before
            self.index.add_segment(segment)

    def share(self) -> None:
        while self.index.take_unshared():
            pass


@settings(max_examples=40 * SOAK, deadline=None)
@given(seed=st.integers(0, 1 << 30), limit=st.sampled_from([1, 50 * KIB, 200 * KIB, MIB, 3 * MIB, 20 * MIB]))
def test_random_calls_stay_within_the_limit(seed, limit) -> None:
    Schedule(seed, limit).run(150)


def test_a_limit_that_suffices_changes_nothing() -> None:
    """The same calls with just enough memory and with all of it: the same drafts, and nothing is given up."""
    bounded, free = (SuffixIndex(max_bytes=limit, cross_tokens=0) for limit in (8 * MIB, 1 << 40))
    drafts: dict[SuffixIndex, list] = {bounded: [], free: []}
    for index, found in drafts.items():
        rng = random.Random(0)
        for epoch in range(3):
            for problem in range(8):
                handles = [index.begin(problem, [problem] * 9) for _ in range(4)]
                for _ in range(60):
                    found += propose(index, handles, [[rng.randrange(4)] for _ in handles], 8)
                for handle in handles:
                    index.end(handle)
            index.close_epoch(epoch)
    assert drafts[bounded] == drafts[free] and sum(map(len, drafts[free])) > 1000
    stats = bounded.take_stats()
    assert not any(stats[name] for name in ("problems_renewed", "requests_let_go", "segments_dropped", "rollouts_lost"))


def test_a_long_epoch_stays_within_the_limit(teach) -> None:
    """Random text takes 109 bytes a token; this epoch alone would take 60 times the limit."""
    drafter = SuffixDrafter(DraftConfig(method="das", history_gib=1.0 / 2**10))
    rng = np.random.default_rng(0)
    for number in range(1000):
        teach(drafter, f"p{number}", rng.integers(0, 50_000, 600).tolist())
        assert sum(drafter.memory_bytes().values()) <= MIB + PER_REQUEST
    drafter.index.check_integrity()
    segments = drafter.index.segments()
    assert {s["epoch"] for s in segments} == {0} and sum(s["num_rollouts"] for s in segments) > 50
    kept = drafter.take_given_up()
    assert kept["segments_dropped"] > 0 and kept["requests_let_go"] == 0 and kept["rollouts_lost"] == 0
    newest = rng.integers(0, 50_000, 600).tolist()
    teach(drafter, "p", newest)
    drafter.begin("r", "p", [1])
    assert drafter.propose(["r"], [newest[:3]], 4) == [newest[3:7]], "what is recent is drafted from"


def test_requests_in_flight_stay_within_the_limit() -> None:
    """64 requests whose texts alone exceed the limit: siblings forget old text first, some are let go at last."""
    limit, rng = 2 * MIB, np.random.default_rng(0)
    index = SuffixIndex(max_bytes=limit, cross_tokens=0)
    handles = [index.begin(i // 8, [i // 8] * 50) for i in range(64)]
    forgot = let_go = 0
    for _ in range(400):
        propose(index, handles, rng.integers(0, 50_000, (64, 25)).tolist(), 4)
        assert sum(index.memory_bytes().values()) <= limit + 64 * PER_REQUEST
        stats = index.take_stats()
        forgot += stats["problems_renewed"]
        assert let_go > 0 or forgot > 0 or stats["requests_let_go"] == 0, "what siblings share goes before a request"
        let_go += stats["requests_let_go"]
    index.check_integrity()
    assert forgot > 8 and 0 < let_go <= 64
    for handle in handles:
        index.end(handle)
    index.close_epoch(0)
    assert index.live_tokens() == 0 and index.memory_bytes()["live"] <= 64 * PER_REQUEST
    teach(index, 1, list(range(100)))
    assert propose(index, [index.begin(1, [1])], [[5, 6, 7]], 3) == [[8, 9, 10]], "later requests are followed again"


def test_a_renewed_problem_drafts_from_what_its_siblings_said() -> None:
    """One request runs on and on, so that its problem never ends; what its siblings said is packed, and found."""
    index, rng = SuffixIndex(max_bytes=MIB, cross_tokens=0), random.Random(0)
    runner = index.begin(7, [1])
    recent: list[int] = []
    renewed = 0
    for _ in range(300):
        recent = [rng.randrange(50_000) for _ in range(200)]
        teach(index, 7, recent)
        propose(index, [runner], [[rng.randrange(50_000)]])
        renewed += index.take_stats()["problems_renewed"]
    assert renewed >= 3
    sibling = index.begin(7, [1])
    assert propose(index, [runner, sibling], [recent[:9], recent[20:26]], 4) == [recent[9:13], recent[26:30]]
    own = [60_000 + i for i in range(40)]
    propose(index, [sibling], [own])
    assert propose(index, [sibling], [own[:5]], 3) == [own[5:8]], "and what is said from then on"
    index.check_integrity()


def segment_of(epoch: int, first: int, num_tokens: int = 65_000) -> bytes:
    """One that takes 8 bytes a token, of one problem; its text counts from `first`."""
    maker = SuffixIndex(cross_tokens=0)
    handle = maker.begin(0, [1])
    propose(maker, [handle], [list(range(first, first + num_tokens))])
    maker.end(handle)
    maker.close_epoch(epoch)
    return maker.take_unshared()


def open_own(index: SuffixIndex, segment: bytes, path) -> None:
    path.write_bytes(segment)
    index.open_segment(str(path))


@pytest.mark.parametrize("foreign", [True, False])
def test_segments_of_one_epoch_go_one_at_a_time(tmp_path, foreign) -> None:
    """Two segments of one epoch do not fit together: the other engine's goes, of two own ones the older."""
    index, first, second = SuffixIndex(max_bytes=MIB, cross_tokens=0), 100_000, 200_000
    open_own(index, segment_of(0, first), tmp_path / "s")
    if foreign:
        index.add_segment(segment_of(0, second))
    else:
        open_own(index, segment_of(0, second), tmp_path / "s")
    assert [(s["num_tokens"], s["foreign"]) for s in index.segments()] == [(65_000, False)]
    assert index.take_stats()["segments_dropped"] == 1
    stays = first if foreign else second
    assert propose(index, [index.begin(0, [1])], [[stays, stays + 1]], 4) == [[stays + i for i in range(2, 6)]]


def test_segments_go_by_epoch_first(tmp_path) -> None:
    index = SuffixIndex(max_bytes=MIB, cross_tokens=0)
    for epoch in range(4):
        open_own(index, segment_of(epoch, 1000 * epoch, 20_000), tmp_path / "s")
        index.add_segment(segment_of(epoch, 1000 * epoch + 7, 20_000))
    kept = [(s["epoch"], s["foreign"]) for s in index.segments()]
    assert kept == [(3, True), (3, False), (2, True), (2, False), (1, True), (1, False)], "of 163 kB each"
    index.add_segment(segment_of(1, 5, 20_000))
    assert [(s["epoch"], s["foreign"]) for s in index.segments()][-2:] == [(1, True), (1, False)]
    index.add_segment(segment_of(4, 5, 20_000))
    assert [(s["epoch"], s["foreign"]) for s in index.segments()][-2:] == [(2, False), (1, False)]
    index.add_segment(segment_of(4, 6, 20_000))
    assert [(s["epoch"], s["foreign"]) for s in index.segments()][-2:] == [(2, True), (2, False)]


def test_a_request_does_not_keep_what_was_dropped() -> None:
    """A segment's memory is free at once, also where a request looks into it; the request goes on with the others."""
    index = SuffixIndex(max_bytes=MIB, cross_tokens=0)
    index.add_segment(segment_of(0, 0, 40_000))
    index.add_segment(segment_of(1, 50_000, 40_000))
    reader = index.begin(0, [1])
    assert propose(index, [reader], [[7, 8]], 2) == [[9, 10]]
    index.add_segment(segment_of(2, 100_000, 40_000))
    index.check_integrity()
    assert [s["epoch"] for s in index.segments()] == [2, 1]
    assert propose(index, [reader], [[9]], 2) == [[]]
    assert propose(index, [reader], [[50_007, 50_008]], 2) == [[50_009, 50_010]]


def test_a_prompt_longer_than_everything_harms_nobody() -> None:
    index = SuffixIndex(max_bytes=MIB, cross_tokens=0)
    neighbor = index.begin(0, [1])
    propose(index, [neighbor], [list(range(100, 200))])
    late = index.begin(1, list(range(1_000_000)))
    assert sum(index.memory_bytes().values()) <= MIB + 2 * PER_REQUEST
    assert propose(index, [neighbor], [[100, 101, 102]], 3) == [[103, 104, 105]]
    propose(index, [late], [list(range(300, 400))])
    assert propose(index, [late], [[300, 301, 302]], 3) == [[303, 304, 305]], "its response is followed"
    index.check_integrity()


def test_thousands_of_problems_at_once_stay_within_the_limit() -> None:
    limit = 4 * MIB
    index = SuffixIndex(max_bytes=limit)
    handles = [index.begin(i, [i, i + 1]) for i in range(3000)]
    for step in range(3):
        propose(index, handles, [[step, i] for i in range(3000)], 4)
        assert sum(index.memory_bytes().values()) <= limit + 3000 * PER_REQUEST
    assert index.take_stats()["requests_let_go"] < 3000, "those that fit are followed"
    for handle in handles:
        index.end(handle)
    index.check_integrity()


def test_the_process_stays_within_the_limit() -> None:
    """Resident memory, which the sums above could miss: 8 MiB and a third while 200 MiB pass through."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, str(resident_growth(8 * MIB)).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        grown = int(pipe.read())
    os.waitpid(pid, 0)
    assert grown <= 8 * MIB * 4 / 3 + MIB, f"{grown / MIB:.1f} MiB"


def resident_growth(limit: int) -> int:
    index, rng = SuffixIndex(max_bytes=limit), np.random.default_rng(0)

    def feed(rounds: int) -> None:
        for number in range(rounds):
            handles = [index.begin(number * 4 + i // 4, [1]) for i in range(16)]
            for _ in range(10):
                propose(index, handles, rng.integers(0, 50_000, (16, 60)).tolist(), 4)
            for handle in handles:
                index.end(handle)

    before = resident()
    feed(200)
    assert sum(index.memory_bytes().values()) > limit / 3
    return resident() - before


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
