"""What a request may carry as its identity, and how the generations of a session are told apart."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_accel.identity import CallNumbers, RolloutIdentity
from rl_accel.sampling.keys import request_key

GOOD = {"problem_id": "p", "sample_index": 2, "step": 9, "validate": True}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@pytest.mark.parametrize(
    ("value", "problem_id"),
    [
        (GOOD, "p"),
        ({**GOOD, "problem_id": 7}, "7"),
        ({**GOOD, "problem_id": ""}, ""),
        ({**GOOD, "problem_id": "\u00fc\U0001f600\x00"}, "\u00fc\U0001f600\x00"),
        ({**GOOD, "problem_id": "x" * (1 << 20)}, "x" * (1 << 20)),
        ({**GOOD, "sample_index": -(1 << 63), "step": (1 << 63) - 1}, "p"),
        ({**GOOD, "of": "somebody else"}, "p"),
    ],
)
def test_what_can_be_read(value, problem_id):
    identity = RolloutIdentity.read(value)
    assert identity.problem_id == problem_id
    assert (identity.sample_index, identity.step, identity.validate, identity.call) == (
        value["sample_index"], value["step"], True, 0,
    )  # fmt: skip


@pytest.mark.parametrize(
    "value",
    [
        "x", 3, 2.5, True, b"p", [], [GOOD], {}, {"rl_accel": GOOD},
        *({k: v for k, v in GOOD.items() if k != left_out} for left_out in ("problem_id", "sample_index", "step")),
        *({**GOOD, "problem_id": v} for v in (None, True, 1.0, 1 << 63, ["p"], {}, b"p", "\udc80")),
        *({**GOOD, k: v} for k in ("sample_index", "step", "call") for v in (None, True, 1.0, "1", 1 << 63, 10**5000)),
        *({**GOOD, "validate": v} for v in (None, 1, "true")),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_in_a_short_line(value):
    with pytest.raises(ValueError, match=r"expected|not Unicode") as error:
        RolloutIdentity.read(value)
    assert len(str(error.value)) < 120 and str(error.value).isascii()


@settings(max_examples=100, deadline=None)
@given(ANYTHING | st.fixed_dictionaries({}, optional={name: ANYTHING for name in (*GOOD, "call")}))
def test_whatever_is_sent_is_read_or_refused(value):
    """And what was read can be hashed: nothing that a request holds may raise anything else inside the engine."""
    try:
        identity = RolloutIdentity.read(value)
    except ValueError:
        return
    request_key(3, identity.problem_id, identity.sample_index, identity.step, identity.validate, identity.call)


def test_the_first_call_is_named_as_before_calls_were_counted():
    """Stored runs stay comparable: the keys of version 0.1 before `call`."""
    assert request_key(5, "p", 2, 9, True) == request_key(5, "p", 2, 9, True, call=0) == -8001550472895194491
    assert request_key(7, "gsm8k/train/3", 1, 4, False) == 9178888167995359865


def keys(prompts, order=None):
    """Return the key of a call on each prompt, made in this order, by index."""
    calls, found = CallNumbers(), {}
    for index in order or range(len(prompts)):
        found[index] = request_key(0, "p", 0, 1, False, calls.next(prompts[index]))
    return found


def test_calls_on_one_prompt_have_keys_of_their_own_and_the_same_in_every_run():
    first = keys([[1, 2, 3]] * 500)
    assert first[0] == request_key(0, "p", 0, 1, False)
    assert len(set(first.values())) == 500
    assert first == keys([(1, 2, 3)] * 500) == keys([np.array([1, 2, 3])] * 500)


def test_calls_on_different_prompts_have_keys_of_their_own():
    """Prompts of one length would else share their noise position by position, and similar ones their texts."""
    assert len(set(keys([[1, 2, 3], [1, 2, 4], [1, 2, 3, 4], [3, 2, 1], []]).values())) == 5


def test_branches_that_race_get_the_same_keys_whoever_is_first():
    """After a common first call; each branch asks twice, for a prompt that no other branch asks for."""
    prompts = [[0], [1, 1], [2, 1], [1, 2, 5], [2, 2, 5]]
    wanted = keys(prompts)
    for order in itertools.permutations(range(1, 5)):
        assert keys(prompts, [0, *order]) == wanted


def test_call_numbers_fit_where_they_travel():
    calls = CallNumbers()
    numbers = [calls.next([i % 7]) for i in range(1000)]
    assert numbers[0] == 0 and all(0 < number < 1 << 63 for number in numbers[1:])
    assert len(set(numbers)) == 1000
