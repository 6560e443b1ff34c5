"""`verify_drafts` against a plain Python loop."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rl_accel.sampling.verify import verify_drafts


def verify_naive(target, draft, num_draft_tokens, bonus, max_spec_len):
    output, start = [], 0
    for request, count in enumerate(num_draft_tokens):
        row = []
        for place in range(start, start + count):
            row.append(target[place])
            if target[place] != draft[place]:
                break
        else:
            row.append(bonus[request])
        output.append(row + [-1] * (max_spec_len + 1 - len(row)))
        start += count
    return output


@st.composite
def batches(draw):
    """Few distinct tokens, so that drafts are often accepted; -1 is vLLM's padded draft."""
    counts = draw(st.lists(st.integers(0, 6), min_size=1, max_size=8))
    total = sum(counts)
    token = st.integers(0, 2)
    target = draw(st.lists(token, min_size=total, max_size=total))
    draft = draw(st.lists(st.integers(-1, 2), min_size=total, max_size=total))
    bonus = draw(st.lists(token, min_size=len(counts), max_size=len(counts)))
    return target, draft, counts, bonus, max(counts) + draw(st.integers(0, 2))


@given(batches(), st.booleans(), st.sampled_from([torch.int32, torch.int64]))
def test_equals_the_loop(batch, bonus_is_column, dtype):
    target, draft, counts, bonus, max_spec_len = batch
    bonus_tensor = torch.tensor(bonus, dtype=torch.int32)
    got = verify_drafts(
        torch.tensor(target, dtype=torch.int64),
        torch.tensor(draft, dtype=dtype),
        counts,
        bonus_tensor[:, None] if bonus_is_column else bonus_tensor,
        max_spec_len,
    )
    assert got.dtype == torch.int32 and got.shape == (len(counts), max_spec_len + 1)
    assert got.tolist() == verify_naive(target, draft, counts, bonus, max_spec_len)


def test_accepted_behind_a_rejection_does_not_count():
    got = verify_drafts(torch.tensor([4, 5, 6]), torch.tensor([4, 9, 6]), [3], torch.tensor([7]), 3)
    assert got.tolist() == [[4, 5, -1, -1]]


@pytest.mark.parametrize(
    ("counts", "bonus", "max_spec_len", "message"),
    [
        ([2], [0], 3, "sums to 2"),
        ([3], [0, 0], 3, "one bonus token"),
        ([3], [0], 2, "max_spec_len=2"),
        ([4, -1], [0, 0], 4, "max_spec_len=4"),
    ],
)
def test_wrong_arguments(counts, bonus, max_spec_len, message):
    tokens = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        verify_drafts(tokens, tokens, counts, torch.tensor(bonus), max_spec_len)
