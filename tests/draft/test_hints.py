"""Hints as such: what is offered of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_accel.draft.hints import Hints


def extra(hint) -> dict:
    return {"rl_accel": {"problem_id": "p", "sample_index": 0, "step": 0, "hint": hint}}


@given(
    hint=st.lists(st.integers(0, 9), max_size=12), written=st.lists(st.integers(0, 9), max_size=12),
    prompt=st.integers(0, 3), longest=st.integers(1, 5),
)  # fmt: skip
def test_what_is_offered_goes_on_from_the_text(hint, written, prompt, longest) -> None:
    hints = Hints(vocab_size=10)
    hints.begin("a", prompt, extra(hint))
    text = np.array([3] * prompt + written, np.int32)
    found = hints.draft("a", text, longest) if "a" in hints else []
    follows = hint[: len(written)] == written
    assert found == (hint[len(written) :][:longest] if follows else [])
    assert hints.take_offered() == len(found) and hints.take_offered() == 0
    assert ("a" in hints) == bool(found), "a hint that says nothing more is forgotten"


@pytest.mark.parametrize("hint", ["12", [10], [-1], [1.0], [True], {"1": 2}, [[1]], 5])
def test_what_is_no_hint_is_refused(hint) -> None:
    hints = Hints(vocab_size=10)
    with pytest.raises(ValueError, match="expected token ids below 10"):
        hints.begin("a", 2, extra(hint))
    assert "a" not in hints


@pytest.mark.parametrize("carried", [None, {}, {"rl_accel": None}, {"rl_accel": 5}, {"rl_accel": {}}, "x"])
def test_requests_without_one_cost_nothing(carried) -> None:
    hints = Hints(vocab_size=10)
    hints.begin("a", 2, carried)
    assert len(hints) == 0
    hints.end("a")


def test_a_draft_leaves_room_for_the_targets_token() -> None:
    hints = Hints(vocab_size=10)
    hints.begin("a", 2, extra([1, 2, 3, 4]), max_tokens=3)
    text = np.array([5, 5, 1], np.int32)
    assert hints.draft("a", text, 8) == [2] and hints.draft("a", text[:2], 8) == [1, 2]
    assert hints.draft("a", np.array([5, 5, 1, 2], np.int32), 8) == []
