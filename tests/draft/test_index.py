"""The C++ index against its naive twin, on random and adversarial streams, and its promises one by one."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_accel.errors import DraftError
from rl_accel.kernels.suffix.api import SuffixIndex, problem_key
from rl_accel.kernels.suffix.reference import NaiveIndex

EMPTY = np.zeros(0, np.int32)


class Pair:
    """The same calls to both indexes."""

    def __init__(self, max_draft: int = 16):
        self.fast = SuffixIndex(max_draft=max_draft, min_probability=1e-6, cross_tokens=0)
        self.naive = NaiveIndex()
        self.handles: dict[int, int] = {}

    def begin(self, problem: int, prompt: list[int]) -> int:
        name = self.naive.begin(problem, prompt)
        self.handles[name] = self.fast.begin(problem, prompt)
        return name

    def append(self, name: int, tokens: list[int], cap: int = 0, threshold: float = 1e-6) -> list[int]:
        self.naive.append(name, tokens)
        return propose(self.fast, [self.handles[name]], [tokens], cap, threshold)[0]

    def end(self, name: int, keep: bool) -> None:
        self.naive.end(name, keep)
        self.fast.end(self.handles.pop(name), keep)

    def check(self, name: int, exact_counts: bool = True) -> None:
        fast, naive = self.fast.inspect(self.handles[name]), self.naive.inspect(name)
        assert fast["live_len"] == naive["live_len"]
        if exact_counts and naive["live_len"] > 0:
            assert fast["live_count"] == naive["live_count"]
        closed = [(epoch, min(length, 64)) for epoch, length, _ in fast["closed"]]
        assert closed == [(epoch, length) for epoch, length, _ in naive["closed"]]


def propose(index: SuffixIndex, handles, rows, cap=16, threshold=1e-6):
    offsets = np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.uint32)
    tokens = np.array([t for row in rows for t in row], np.int32)
    n = len(handles)
    drafts, ends, paths = index.propose_batch(
        np.array(handles, np.int64), tokens, offsets, np.full(n, cap, np.uint32), np.full(n, threshold, np.float32)
    )
    assert np.all((paths > 0) & (paths <= 1))
    for i in range(n):
        assert np.all(np.diff(paths[ends[i] : ends[i + 1]]) <= 0), "path probabilities must not rise"
    return [drafts[ends[i] : ends[i + 1]].tolist() for i in range(n)]


def actions_over(largest_token: int) -> st.SearchStrategy:
    """Few tokens make long matches; many make tokens that never followed each other."""
    action = st.tuples(
        st.sampled_from(["begin", "append", "append", "append", "append", "end", "close", "renew", "drop"]),
        st.integers(0, 7),
        st.lists(st.integers(0, largest_token), min_size=1, max_size=6),
    )
    return st.lists(action, min_size=20, max_size=60)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([2, 4, 12]).flatmap(actions_over))
def test_matches_are_those_of_the_twin(actions) -> None:
    """Any interleaving of requests, closes and drops: same match lengths, same counts, drafts that once followed."""
    pair, live, epoch = Pair(), [], 0
    for action, number, tokens in actions:
        if action == "begin" or not live:
            live.append(pair.begin(number % 2, tokens[:2] if number % 4 else [1, 0, 1]))
            check_draft(pair, live[-1], pair.append(live[-1], [], cap=8))
            continue
        name = live[number % len(live)]
        if action == "append":
            draft = pair.append(name, tokens, cap=8)
            pair.check(name)
            check_draft(pair, name, draft)
        elif action == "end":
            pair.end(name, keep=number % 3 != 0)
            live.remove(name)
        elif action in ("close", "renew"):
            while action == "renew" and live:  # problems that begin again look into what was closed
                pair.end(live.pop(), keep=True)
            pair.fast.close_epoch(epoch)
            pair.naive.close_epoch(epoch)
            epoch += 1
        else:
            pair.fast.drop_before(epoch - number % 3)
            pair.naive.drop_before(epoch - number % 3)
    pair.fast.check_integrity()


def check_draft(pair: Pair, name: int, draft: list[int]) -> None:
    """A draft where something continued the match, none elsewhere; each token of it once followed the one before."""
    live, closed = pair.naive.continuations(name)
    assert bool(draft) == bool(live or any(closed))
    for k, token in enumerate(draft):
        assert token in pair.naive.successors(name, draft[:k])


@pytest.mark.parametrize(
    "stream",
    [
        [0] * 200,
        [0, 1] * 100,
        ([0] * 9 + [1]) * 20,
        [i % 7 for i in range(200)],
        list(range(200)),
        [0 if bin(i).count("1") % 2 else 1 for i in range(200)],
    ],
    ids=["constant", "period2", "period10", "period7", "distinct", "thue-morse"],
)
def test_adversarial_streams(stream) -> None:
    """Long suffix-link chains and states that split all the time; counts are exact for short chains only."""
    pair = Pair()
    first, second = pair.begin(0, []), pair.begin(0, [])
    for i, token in enumerate(stream):
        pair.append(first, [token])
        if i >= 3:
            pair.append(second, [stream[i - 3]])
        if i % 20 == 0:
            pair.check(first, exact_counts=False)
            if i >= 3:
                pair.check(second, exact_counts=False)
    pair.fast.check_integrity()


def test_crowded_states_stay_right() -> None:
    """Hundreds of different continuations of one token move its edges into the hash table."""
    rng = random.Random(0)
    pair = Pair()
    name = pair.begin(0, [])
    text = [t for _ in range(700) for t in (5, rng.randrange(100, 900))]
    for at in range(0, len(text), 50):
        pair.append(name, text[at : at + 50])
    pair.fast.check_integrity()
    pair.check(name)
    other = pair.begin(0, [])
    assert pair.append(other, [5], cap=1)[0] in set(text[1::2])


def test_siblings_past_epochs_and_own_text_are_drafted_from() -> None:
    index, text = SuffixIndex(cross_tokens=0, min_probability=1e-6), list(range(10, 60))
    sibling = index.begin(1, [3])
    propose(index, [sibling], [text], cap=0)
    late = index.begin(1, [3])
    assert propose(index, [late], [text[:5]], cap=10)[0] == text[5:15], "from a live sibling"
    index.end(sibling, True)
    index.end(late, False)
    index.close_epoch(0)
    past = index.begin(1, [3])
    assert propose(index, [past], [text[:2]], cap=10)[0] == text[2:12], "from a past epoch"
    own = index.begin(2, [3])
    assert propose(index, [own], [[*text, *text[:8]]], cap=10)[0] == text[8:18], "from the request itself"
    asked = index.begin(3, text)
    assert propose(index, [asked], [text[20:28]], cap=10)[0] == text[28:38], "from the prompt"


def test_first_token_of_a_response_is_predicted_from_its_beginning() -> None:
    """A closed epoch knows where responses began; nothing but the start is matched."""
    index = SuffixIndex(cross_tokens=0)
    request = index.begin(1, [3])
    propose(index, [request], [[7, 8, 9, 7, 5]], cap=0)
    index.end(request, True)
    index.close_epoch(0)
    assert index.inspect(index.begin(1, [3]))["closed"] == [(0, 1, 1)]


def test_other_problems_help_only_through_the_cross_index() -> None:
    text = list(range(10, 60))
    for cross, expected in ((0, []), (1 << 12, text[8:18])):
        index = SuffixIndex(cross_tokens=cross)
        teacher = index.begin(1, [3])
        propose(index, [teacher], [text], cap=0)
        index.end(teacher, True)
        pupil = index.begin(2, [4])
        for token in text[:4]:  # ended rollouts enter the index over all problems a slice per step
            propose(index, [pupil], [[token]], cap=0)
        assert propose(index, [pupil], [text[4:8]], cap=10)[0] == expected


def test_unkept_rollouts_leave_no_history() -> None:
    index = SuffixIndex()
    request = index.begin(1, [3])
    propose(index, [request], [list(range(10, 40))], cap=0)
    index.end(request, False)
    assert index.close_epoch(0)["num_tokens"] == 0
    assert index.segments() == []
    late = index.begin(1, [3])
    assert propose(index, [late], [[10, 11, 12, 13]], cap=8)[0] == []


def test_tokens_behind_a_stop_token_are_not_kept() -> None:
    index = SuffixIndex(stop_token_ids=[2], cross_tokens=0)
    request = index.begin(1, [3])
    propose(index, [request], [[10, 11, 2, 55, 56]], cap=0)
    index.end(request, True)
    assert index.close_epoch(0)["num_tokens"] == 3
    late = index.begin(1, [3])
    assert propose(index, [late], [[10]], cap=8)[0] == [11, 2]


def test_caps_thresholds_and_totals_bound_the_drafts() -> None:
    index, text = SuffixIndex(cross_tokens=0, min_probability=1e-6), list(range(10, 60))
    teacher = index.begin(1, [3])
    propose(index, [teacher], [text], cap=0)
    handles = np.array([index.begin(1, [3]) for _ in range(4)], np.int64)
    offsets = np.arange(5, dtype=np.uint32)
    tokens = np.array([text[i] for i in range(4)], np.int32)
    max_draft_tokens, zero = np.array([0, 1, 5, 9], np.uint32), np.zeros(4, np.float32)

    def sizes(drafted) -> list[int]:
        return np.diff(drafted[1]).tolist()

    drafted = index.propose_batch(handles, tokens, offsets, max_draft_tokens, zero)
    assert sizes(drafted) == [0, 1, 5, 9]
    none = np.zeros(0, np.int32), np.zeros(5, np.uint32)
    again = np.array([drafted[0][drafted[1][i]] if max_draft_tokens[i] else text[i + 1] for i in range(4)], np.int32)
    drafted = index.propose_batch(handles, again, offsets, np.full(4, 9, np.uint32), np.full(4, 2.0, np.float32))
    assert sizes(drafted) == [0, 0, 0, 0], "a threshold above one means no draft"
    again = np.array([text[i + 2] for i in range(4)], np.int32)
    total = np.array([4, 12], np.uint32)
    drafted = index.propose_batch(handles, again, offsets, np.full(4, 9, np.uint32), zero, total)
    assert len(drafted[0]) == 8, "requests and drafts fill the largest size and no more"
    drafted = index.propose_batch(handles, *none, np.full(4, 9, np.uint32), zero)
    assert all(size > 0 for size in sizes(drafted)), "a request without new tokens may be asked again"


def test_probabilities_are_calibrated() -> None:
    """After enough outcomes, tokens said to be accepted with probability q are, within 0.05 in every populated bin."""
    rng = np.random.default_rng(0)
    index = SuffixIndex(max_draft=4, cross_tokens=0, min_probability=1e-3)
    said, happened = [], []
    for round_ in range(60):
        handles = [index.begin(round_, []) for _ in range(8)]
        texts = [np.where(rng.random(80) < 0.25, rng.integers(0, 50, 80), np.arange(80) % 40 + 100) for _ in handles]
        drafts = [EMPTY] * 8
        paths = [EMPTY] * 8
        for at in range(80):
            for i in range(8):
                if round_ >= 20 and len(drafts[i]):
                    said.append(paths[i][0])
                    happened.append(drafts[i][0] == texts[i][at])
            tokens = np.array([t[at] for t in texts], np.int32)
            found, ends, path = index.propose_batch(
                np.array(handles, np.int64),
                tokens,
                np.arange(9, dtype=np.uint32),
                np.full(8, 4, np.uint32),
                np.zeros(8, np.float32),
            )
            drafts = [found[ends[i] : ends[i + 1]] for i in range(8)]
            paths = [path[ends[i] : ends[i + 1]] for i in range(8)]
        for handle in handles:
            index.end(handle, False)
    said, happened = np.array(said), np.array(happened)
    checked = 0
    for low in np.arange(0, 1, 0.1):
        inside = (said >= low) & (said < low + 0.1)
        if inside.sum() > 1500:
            checked += 1
            assert abs(said[inside].mean() - happened[inside].mean()) < 0.05
    assert checked >= 2


def test_rows_and_lists_are_the_same_call() -> None:
    rng = np.random.default_rng(1)
    flat, table = SuffixIndex(), SuffixIndex()
    prompts = [rng.integers(0, 9, 5).astype(np.int32) for _ in range(6)]
    texts = [np.concatenate([p, rng.integers(0, 3, 60).astype(np.int32)]) for p in prompts]
    a = [flat.begin(i % 2, p) for i, p in enumerate(prompts)]
    b = [table.begin(i % 2, p) for i, p in enumerate(prompts)]
    matrix = np.zeros((9, 80), np.int32)
    order = [4, 0, 7, 2, 8, 5]
    for row, text in zip(order, texts, strict=True):
        matrix[row, : len(text)] = text
    for at in range(5, 65, 3):
        left = propose(flat, a, [t[at : at + 3].tolist() for t in texts], cap=6)
        n = np.full(6, at + 3, np.uint32)
        right = table.propose_rows(
            np.array(b, np.int64),
            matrix,
            np.array(order, np.uint32),
            n,
            np.full(6, 6, np.uint32),
            np.full(6, 1e-6, np.float32),
        )
        assert left == right


def test_window_drops_and_reopens(tmp_path) -> None:
    index = SuffixIndex(cross_tokens=0)
    for epoch in range(4):
        request = index.begin(1, [3])
        propose(index, [request], [[epoch * 100 + i for i in range(10)]], cap=0)
        index.end(request, True)
        index.close_epoch(epoch, policy_version=epoch * 7)
    assert [s["epoch"] for s in index.segments()] == [3, 2, 1, 0]
    index.write_segment(3, str(tmp_path / "old"))
    index.drop_before(2)
    assert [s["epoch"] for s in index.segments()] == [3, 2]
    late = index.begin(1, [3])
    assert propose(index, [late], [[102, 103, 104, 105]], cap=4)[0] == [], "epoch 1 is gone"
    assert propose(index, [late], [[202, 203, 204, 205]], cap=4)[0] == [206, 207, 208, 209]
    index.drop_before(3)
    assert propose(index, [late], [[206, 207]], cap=2)[0] == [], "not even for a request that looked into it"
    info = index.open_segment(str(tmp_path / "old"))
    assert (info["epoch"], info["policy_version"], info["num_tokens"]) == (0, 0, 10)


def test_memory_bounds() -> None:
    """At most 64 bytes a live token and 12 a closed one, on a realistic group of siblings."""
    rng = np.random.default_rng(0)
    phrases = [rng.integers(0, 3000, 24).astype(np.int32) for _ in range(200)]
    index = SuffixIndex(cross_tokens=0)
    for problem in range(4):
        for _ in range(8):
            handle = index.begin(problem, [1])
            text = np.concatenate([phrases[rng.integers(200)] for _ in range(85)])
            propose(index, [handle], [text.tolist()], cap=0)
            index.end(handle, True)
    assert index.memory_bytes()["live"] / index.live_tokens() <= 64
    info = index.close_epoch(0)
    assert info["num_bytes"] / info["num_tokens"] <= 12
    assert index.live_tokens() == 0


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda i: i.end(5, True), "no live request"),
        (lambda i: i.end(-1, True), "no live request"),
        (lambda i: i.begin(1, [-3]), "negative"),
        (lambda i: propose(i, [i.begin(1, [])], [[-7]]), "negative"),
        (lambda i: i.open_segment("/nonexistent/segment"), "No such file"),
        (lambda i: i.load_scoring_state(np.zeros(3, np.float32)), "another size"),
    ],
)
def test_wrong_use_is_refused(break_it, says) -> None:
    index = SuffixIndex()
    with pytest.raises(DraftError, match=says):
        break_it(index)
    index.check_integrity()


def test_an_ended_handle_is_not_confused_with_its_successor() -> None:
    index = SuffixIndex()
    first = index.begin(1, [])
    index.end(first, False)
    second = index.begin(1, [])
    assert second != first
    with pytest.raises(DraftError, match="no live request"):
        propose(index, [first], [[1]])


def test_problem_keys() -> None:
    assert problem_key("7") != problem_key(7) != problem_key([7])
    assert problem_key([1, 2]) == problem_key(np.array([1, 2]))
    assert 0 <= problem_key("x") < 1 << 63
