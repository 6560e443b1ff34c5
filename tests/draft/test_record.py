"""Recorded rollouts: written and read back, lines of others are taken, bad lines are named."""

from __future__ import annotations

import json

import pytest

from rl_accel.draft.record import Rollout, append_rollouts, read_rollouts
from rl_accel.errors import DraftError

FIRST = Rollout(
    epoch=0, step=3, problem='a "quoted"\nproblem ü', sample=1, prompt_token_ids=(1, 2), token_ids=(7, 8, 9)
)
SECOND = Rollout(epoch=1, step=4, problem="b", sample=0, prompt_token_ids=(), token_ids=())


def test_what_is_appended_is_read_in_order(tmp_path) -> None:
    path = tmp_path / "rollouts.jsonl"
    append_rollouts(path, [FIRST])
    append_rollouts(path, iter([SECOND, FIRST]))
    assert list(read_rollouts(path)) == [FIRST, SECOND, FIRST]
    assert len(path.read_text().splitlines()) == 3


def test_lines_of_others_need_epoch_problem_and_tokens_only(tmp_path) -> None:
    path = tmp_path / "foreign.jsonl"
    path.write_text('{"epoch": 2, "problem": 17, "token_ids": [5, 6], "reward": 1.0}\n\n   \n')
    assert list(read_rollouts(path)) == [Rollout(2, 2, "17", 0, (), (5, 6))]


@pytest.mark.parametrize(
    "bad",
    [
        "{",
        "[]",
        "null",
        '"text"',
        '{"epoch": 0, "problem": "a"}',
        '{"problem": "a", "token_ids": [1]}',
        '{"epoch": 0, "token_ids": [1]}',
        '{"epoch": "first", "problem": "a", "token_ids": [1]}',
        '{"epoch": null, "problem": "a", "token_ids": [1]}',
        '{"epoch": 0, "problem": "a", "token_ids": 5}',
        '{"epoch": 0, "problem": "a", "token_ids": ["x"]}',
        '{"epoch": 0, "problem": "a", "token_ids": [[1]]}',
        '{"epoch": Infinity, "problem": "a", "token_ids": [1]}',
        '{"epoch": 0, "problem": "a", "token_ids": [1], "prompt_token_ids": null}',
        pytest.param("[" * 100_000 + "]" * 100_000, id="deep"),
        pytest.param('{"epoch": ' + "9" * 5000 + ', "problem": "a", "token_ids": [1]}', id="many digits"),
    ],
)
def test_a_bad_line_is_named(tmp_path, bad) -> None:
    path = tmp_path / "rollouts.jsonl"
    append_rollouts(path, [FIRST, SECOND])
    with path.open("a") as file:
        file.write(f"\n{bad}\n")
    found = read_rollouts(path)
    assert [next(found), next(found)] == [FIRST, SECOND], "lines before it are read"
    with pytest.raises(DraftError, match=r"rollouts\.jsonl, line 4 is not a recorded rollout"):
        next(found)


def test_a_line_that_was_cut_when_the_writer_was_killed_is_named(tmp_path) -> None:
    path = tmp_path / "rollouts.jsonl"
    append_rollouts(path, [FIRST, FIRST])
    path.write_text(path.read_text()[:-9])
    with pytest.raises(DraftError, match="line 2"):
        list(read_rollouts(path))


def test_lines_that_are_no_text_are_refused(tmp_path) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(json.dumps({"epoch": 0}).encode() + b"\xff\xfe\n")
    with pytest.raises(DraftError, match="line 1"):
        list(read_rollouts(path))
