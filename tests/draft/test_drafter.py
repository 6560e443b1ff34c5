"""The drafter: requests by name, epochs, windows and memory."""

from __future__ import annotations

import random

import numpy as np
import pytest

from rl_accel.draft import DraftConfig, SuffixDrafter
from rl_accel.errors import DraftError
from rl_accel.kernels.suffix.api import problem_key

TEXT = list(range(10, 110))


def das(**settings) -> DraftConfig:
    return DraftConfig(method="das", **settings)


def state_of(drafter: SuffixDrafter) -> tuple:
    """What a refused call must leave alone."""
    return (
        dict(drafter._slots),
        sorted(drafter._free),
        drafter.index.live_tokens(),
        drafter.index.scoring_state().tolist(),
        [values.tolist() for values in drafter.planner.lengths.state_dict().values()],
    )


# Requests.


def test_a_drafter_needs_no_configuration_and_learns_from_siblings_and_epochs() -> None:
    drafter = SuffixDrafter()
    drafter.begin("a", 7, [1, 2])
    assert drafter.propose(["a"], [TEXT], 8) == [[]]
    drafter.begin("b", 7, [1, 2])
    assert "b" in drafter and "c" not in drafter and len(drafter) == 2
    assert drafter.propose(["b"], [TEXT[:4]], 8) == [TEXT[4:12]]
    drafter.end("b", keep=False)
    drafter.end("a")
    info = drafter.close_epoch(0, policy_version=3)
    assert (info["num_rollouts"], info["num_tokens"], info["policy_version"]) == (1, 100, 3)
    drafter.begin("c", 7, [1, 2])
    assert drafter.propose(["c"], [TEXT[:1]], 8) == [TEXT[1:9]]
    assert drafter.propose(["c"], [TEXT[1:10]], 8) == [TEXT[10:18]]
    drafter.drop_before(1)
    assert drafter.index.segments() == []


def test_caps_are_per_call_or_per_request_and_zero_only_appends(teach) -> None:
    drafter = SuffixDrafter(das(num_speculative_tokens=6))
    teach(drafter, "p", TEXT)
    drafter.close_epoch(0)
    names = ["r0", "r1", "r2", "r3"]
    for name in names:
        drafter.begin(name, "p", [1])
    firsts = [[t] for t in TEXT[:4]]
    drafts = drafter.propose(names, [TEXT[: i + 1] for i in range(4)], [0, 1, 3, 99])
    assert drafts == [[], TEXT[2:3], TEXT[3:6], TEXT[4:10]]
    assert drafter.propose(names, [[t + 1] for [t] in firsts], 0) == [[], [], [], []]
    assert drafter.propose(names, [[t + 2] for [t] in firsts], np.array([2, 2, 2, 2])) == [
        TEXT[i + 3 : i + 5] for i in range(4)
    ]
    assert drafter.propose(names[:1], [[]], -1) == [[]]
    assert drafter.propose([], [], 4) == []


def test_no_request_is_no_work() -> None:
    drafter = SuffixDrafter(das())
    for number in range(200):
        drafter.observe_step(0.01 + 1e-4 * (number % 7), 1 + number % 3, number % 7)
    assert drafter.planner.cost.ready
    assert drafter.propose([], [], 4) == []
    assert drafter.propose_rows([], np.zeros((2, 2), np.int32), np.zeros(0, np.uint32), np.zeros(0, np.uint32)) == []
    with pytest.raises(DraftError, match="seconds > 0"):
        SuffixDrafter(das()).observe_step(0.0, 1, 0)


def test_drafts_end_before_the_limit_of_a_request(teach) -> None:
    drafter = SuffixDrafter(das())
    teach(drafter, "p", TEXT)
    drafter.close_epoch(0)
    drafter.begin("r", "p", [1], max_tokens=8)
    lengths = [len(drafter.propose(["r"], [[t]], 16)[0]) for t in TEXT[:1]]
    assert lengths == [6], "a token was sampled and the target adds the last one"
    drafter.begin("none", "p", [1], max_tokens=0)
    assert drafter.propose(["none"], [[]], 16) == [[]]


@pytest.mark.parametrize("limit", [-5, 0])
def test_a_request_that_may_generate_nothing_is_no_error(limit) -> None:
    drafter = SuffixDrafter(das())
    drafter.begin("r", "p", [1], max_tokens=limit)
    drafter.end("r")
    assert len(drafter) == 0


MISUSE = {
    "unknown request": (lambda d: d.propose(["a", "x"], [[1], [1]], 4), "'x' has not begun"),
    "ended request": (lambda d: d.propose(["ended"], [[1]], 4), "'ended' has not begun"),
    "end of an unknown request": (lambda d: d.end("x"), "'x' has not begun"),
    "end of an ended request": (lambda d: d.end("ended"), "'ended' has not begun"),
    "begun twice": (lambda d: d.begin("a", "q", [1]), "'a' has begun already"),
    "negative prompt": (lambda d: d.begin("x", "q", [1, -1]), "negative"),
    "negative token": (lambda d: d.propose(["a", "b"], [[1], [2, -1]], 4), "negative"),
    "fewer lists of tokens": (lambda d: d.propose(["a", "b"], [[1]], 4), "2 requests, but 1 lists"),
    "more lists of tokens": (lambda d: d.propose(["a"], [[1], [1]], 4), "1 requests, but 2 lists"),
    "fewer max_draft_tokens": (
        lambda d: d.propose(["a", "b"], [[1], [1]], [4, 4, 4]),
        "2 requests, but 3 draft lengths",
    ),
    "negative token in rows": (lambda d: rows(d, [[1, 5, 6], [1, 5, -1]], [3, 3]), "negative"),
    "tokens lost in rows": (lambda d: rows(d, [[1, 5, 6], [1, 5, 6]], [3, 1]), "lost tokens"),
    "rows beyond the matrix": (lambda d: rows(d, [[1, 5, 6]], [3, 3]), "outside of the matrix"),
    "more tokens than columns of rows": (lambda d: rows(d, [[1, 5], [1, 5]], [2, 3]), "more tokens than columns"),
}


def rows(drafter: SuffixDrafter, texts: list[list[int]], num_tokens: list[int]) -> list[list[int]]:
    matrix = np.array(texts, np.int32)
    return drafter.propose_rows(["a", "b"], matrix, np.arange(2, dtype=np.uint32), np.array(num_tokens, np.uint32))


@pytest.mark.parametrize("name", MISUSE)
def test_wrong_use_is_refused_and_changes_nothing(name) -> None:
    drafter = SuffixDrafter(das())
    for request in ("a", "b", "ended"):
        drafter.begin(request, "p", [1])
    drafter.propose(["a", "b"], [[5], [5]], 4)
    drafter.end("ended")
    before = state_of(drafter)
    call, says = MISUSE[name]
    with pytest.raises(DraftError, match=says):
        call(drafter)
    assert state_of(drafter) == before
    drafter.index.check_integrity()
    if "rows" not in name:  # those bring the whole text again
        assert drafter._generated[:3].tolist() == [1, 1, 0]
    assert rows(drafter, [[1, 5, 6], [1, 5, 6]], [3, 3]) is not None


def test_rows_draft_what_lists_draft(teach) -> None:
    left, right = SuffixDrafter(das()), SuffixDrafter(das())
    for drafter in (left, right):
        teach(drafter, "p", TEXT)
        drafter.close_epoch(0)
        for name in ("a", "b"):
            drafter.begin(name, "p", [1])
    matrix = np.array([[1, *TEXT], [1, *TEXT[50:], *TEXT[:50]]], np.int32)
    for n in range(2, 60, 3):
        fresh = [row[1:2] if n == 2 else row[n - 3 : n] for row in matrix.tolist()]
        lists = left.propose(["a", "b"], fresh, 16)
        table = right.propose_rows(["a", "b"], matrix, np.array([0, 1], np.uint32), np.full(2, n, np.uint32))
        assert lists == table and any(lists)
    assert left._generated.tolist() == right._generated.tolist()


def test_thousands_of_requests_leave_nothing_behind() -> None:
    drafter, rng, live = SuffixDrafter(das()), random.Random(0), []
    for number in range(2000):
        name = f"r{number}"
        drafter.begin(name, number % 20, [1, number % 20])
        live.append(name)
        chosen = rng.sample(live, rng.randint(1, len(live)))
        drafter.propose(chosen, [[rng.randrange(9) for _ in range(rng.randrange(4))] for _ in chosen], 4)
        if len(live) == 64:
            drafter.end(live.pop(rng.randrange(64)), keep=rng.random() < 0.5)
        if number % 400 == 399:
            drafter.close_epoch(number // 400)
            drafter.index.check_integrity()
    assert len(drafter) == len(live) == 63
    assert len(drafter._handles) == 64 and len(set(drafter._handles[list(drafter._slots.values())])) == 63
    for name in live:
        drafter.end(name)
    drafter.close_epoch(9)
    assert len(drafter) == 0 and sorted(drafter._free) == list(range(64))
    assert drafter.index.live_tokens() == 0
    drafter.index.check_integrity()


def test_drafts_do_not_depend_on_the_order_of_requests(teach) -> None:
    """Requests of different problems, asked in two orders: each gets the drafts of its own problem."""
    drafts = []
    for order in (1, -1):
        drafter, rng = SuffixDrafter(das()), random.Random(0)
        texts = {f"r{i}": [rng.randrange(1000 * i, 1000 * i + 30) for _ in range(120)] for i in range(9)}
        for name, text in texts.items():
            teach(drafter, f"of {name}", text)
        drafter.close_epoch(0)
        for name in texts:
            drafter.begin(name, f"of {name}", [1])
        found, names = [], list(texts)[::order]
        for at in range(100):
            rng.shuffle(names)
            drafted = drafter.propose(names, [[texts[name][at]] for name in names], [1 + int(n[1]) for n in names])
            found.append(dict(zip(names, drafted, strict=True)))
        drafts.append(found)
    assert drafts[0] == drafts[1]
    accepted = sum(found["r8"] == texts["r8"][at + 1 : at + 10] for at, found in enumerate(drafts[0]))
    assert accepted > 50


# Epochs.


def run_epoch(drafter: SuffixDrafter, epoch: int, texts: list[list[int]]) -> None:
    """Every text is one problem's rollout, verified token by token."""
    for problem, text in enumerate(texts):
        drafter.begin("r", problem, [1])
        at = 0
        while at < len(text):
            draft = drafter.propose(["r"], [text[at : at + 1]], 8)[0]
            right = 0
            while right < len(draft) and at + 1 + right < len(text) and draft[right] == text[at + 1 + right]:
                right += 1
            if right:
                drafter.propose(["r"], [text[at + 1 : at + 1 + right]], 0)
            at += 1 + right
        drafter.end("r")
    drafter.close_epoch(epoch)


def test_the_window_shrinks_where_old_epochs_predict_badly_and_grows_again() -> None:
    drafter, rng = SuffixDrafter(das(window=8, cross_problems=False)), random.Random(0)

    def fresh() -> list[list[int]]:
        return [[rng.randrange(5000) for _ in range(80)] for _ in range(4)]

    same, epoch, windows = fresh(), 0, []
    for texts in [same] * 5 + [fresh()]:
        run_epoch(drafter, epoch, texts)
        windows.append(drafter.window)
        epoch += 1
    assert windows == [8, 8, 8, 8, 8, 4], windows
    kept = [segment["epoch"] for segment in drafter.index.segments()]
    assert kept == [5, 4, 3, 2], "only epochs of the window are kept"
    same = fresh()
    for _ in range(8):
        run_epoch(drafter, epoch, same)
        windows.append(drafter.window)
        epoch += 1
        assert len(drafter.index.segments()) <= drafter.window
    assert windows[-1] > 4 and max(windows) <= 8, windows
    drafter.index.check_integrity()


def test_the_window_of_the_configuration_is_never_exceeded() -> None:
    drafter = SuffixDrafter(das(window=2))
    for epoch in range(5):
        run_epoch(drafter, epoch, [TEXT])
    assert [s["epoch"] for s in drafter.index.segments()] == [4, 3]


def test_what_is_not_kept_never_enters_the_history(teach) -> None:
    drafter = SuffixDrafter(das())
    teach(drafter, "p", TEXT, keep=False)
    drafter.close_epoch(0)
    assert drafter.index.segments() == []
    assert len(drafter.planner.lengths) == 0
    teach(drafter, "q", TEXT[:4])
    for problem in ("p", "q", "other"):
        drafter.begin("r", problem, [1])
        for at in range(20):
            draft = drafter.propose(["r"], [TEXT[at : at + 1]], 8)[0]
            assert draft in ([], TEXT[at + 1 : 4])
        drafter.end("r", keep=False)


def test_lengths_are_learned_by_problem(teach) -> None:
    drafter = SuffixDrafter(das())
    for _ in range(3):
        teach(drafter, "short", TEXT[:5])
        teach(drafter, "long", TEXT)
    median = drafter.planner.lengths.median
    assert (median(problem_key("short")), median(problem_key("long"))) == (5, 100)
