"""Token files: what is written is read back, and the first divergence is named exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_accel.compare.tokens import compare_tokens, first_divergence, load_tokens, save_tokens
from rl_accel.errors import CompareError

PROBLEMS, SAMPLES = 5, 4


def write_steps(directory: Path, steps: int, seed: int = 0, shuffle: int | None = None, edit=None) -> Path:
    """Random rollouts; `edit(step, responses by name)` plants a difference, `shuffle` reorders the rows."""
    generator = np.random.default_rng(seed)
    for step in range(1, steps + 1):
        rows = {
            (f"problem-{p}", s): generator.integers(0, 500, generator.integers(1, 40)).tolist()
            for p in range(PROBLEMS)
            for s in range(SAMPLES)
        }
        if edit is not None:
            edit(step, rows)
        names = list(rows)
        if shuffle is not None:
            np.random.default_rng(shuffle + step).shuffle(names)
            names = [(str(problem), int(sample)) for problem, sample in names]
        problems, samples = [name[0] for name in names], [name[1] for name in names]
        save_tokens(directory / f"{step}.npz", problems, samples, [7] * len(names), [rows[n] for n in names])
    return directory


@settings(max_examples=40, deadline=None)
@given(
    responses=st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=20), max_size=12),
    problem=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8),
)
def test_saved_rows_are_read_back(tmp_path_factory, responses, problem):
    path = tmp_path_factory.mktemp("tokens") / "3.npz"
    save_tokens(path, [problem] * len(responses), range(len(responses)), range(len(responses)), responses)
    rows = load_tokens(path)
    assert {name: (row.prompt_length, row.token_ids.tolist()) for name, row in rows.items()} == {
        (problem, i): (i, response) for i, response in enumerate(responses)
    }
    assert [p.name for p in path.parent.iterdir()] == ["3.npz"]


def test_row_order_does_not_matter(tmp_path):
    a, b = write_steps(tmp_path / "a", 4), write_steps(tmp_path / "b", 4, shuffle=9)
    assert (a / "1.npz").read_bytes() != (b / "1.npz").read_bytes()
    result = compare_tokens(a, b)
    assert (result.steps, result.last_identical_step, result.divergence) == ((1, 2, 3, 4), 4, None)


@pytest.mark.parametrize("position", [0, 3, -1])
def test_one_planted_token_is_named(tmp_path, position):
    planted = {}

    def edit(step, rows):
        if step == 3:
            row = rows["problem-2", 1] = [5, 6, 7, 8, 9]
            planted["before"] = row[position]

    def edit_other(step, rows):
        edit(step, rows)
        if step == 3:
            rows["problem-2", 1][position] = 499

    a = write_steps(tmp_path / "a", 5, edit=edit)
    b = write_steps(tmp_path / "b", 5, shuffle=1, edit=edit_other)
    result = compare_tokens(a, b)
    divergence = result.divergence
    assert result.last_identical_step == 2
    assert (divergence.step, divergence.problem_id, divergence.sample_index) == (3, "problem-2", 1)
    assert (divergence.reason, divergence.position) == ("token", position % 5)
    assert (divergence.token_a, divergence.token_b) == (planted["before"], 499)
    assert (divergence.rows_different, divergence.rows) == (1, PROBLEMS * SAMPLES)


def test_parting_kinds_and_their_order(tmp_path):
    base = (["p", "p", "q"], [0, 1, 0], [4, 4, 4], [[1, 2, 3], [4, 5], [6, 7, 8]])

    def divergence(problems, samples, prompts, responses):
        save_tokens(tmp_path / "1.npz", *base)
        save_tokens(tmp_path / "2.npz", problems, samples, prompts, responses)
        return first_divergence(8, load_tokens(tmp_path / "1.npz"), load_tokens(tmp_path / "2.npz"))

    shorter = divergence(*base[:3], [[1, 2], [4, 5], [6, 7, 8]])
    assert (shorter.reason, shorter.position, shorter.token_a, shorter.token_b) == ("length", 2, 3, None)
    prompt = divergence(*base[:2], [4, 5, 4], [[1, 2, 3], [4, 5], [9, 7, 8]])
    assert (prompt.reason, prompt.problem_id, prompt.sample_index) == ("prompt", "p", 1)
    assert (prompt.position, prompt.rows_different) == (None, 2)
    missing = divergence(["p", "q"], [0, 0], [4, 4], [[0, 2, 3], [6, 7, 8]])
    assert (missing.reason, missing.sample_index, missing.rows, missing.rows_different) == ("row", 1, 3, 2)
    earliest = divergence(*base[:3], [[1, 2, 0], [4, 0], [6, 7, 0]])
    assert (earliest.problem_id, earliest.sample_index, earliest.position) == ("p", 1, 1)
    assert divergence(*base) is None


def test_steps_on_one_side_are_reported_not_compared(tmp_path):
    a, b = write_steps(tmp_path / "a", 4), write_steps(tmp_path / "b", 6)
    (a / "2.npz").unlink()
    (b / ".7.npz.123.partial").write_bytes(b"torn")
    result = compare_tokens(a, b)
    assert (result.steps, result.steps_one_sided, result.divergence) == ((1, 3, 4), (2, 5, 6), None)
    assert compare_tokens(None, b).steps == ()


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(CompareError, match="of one length"):
        save_tokens(tmp_path / "1.npz", ["p"], [0, 1], [1], [[1]])
    with pytest.raises(CompareError, match="problem 'p', sample 0"):
        save_tokens(tmp_path / "1.npz", ["p", "p"], [0, 0], [1, 1], [[1], [2]])
    assert list(tmp_path.iterdir()) == []
    whole = tmp_path / "2.npz"
    save_tokens(whole, ["p"], [0], [1], [[1, 2, 3]])
    (tmp_path / "3.npz").write_bytes(whole.read_bytes()[:-30])
    with pytest.raises(CompareError, match="is not a token file"):
        load_tokens(tmp_path / "3.npz")
    arrays = {**np.load(whole), "offsets": np.array([0, 9])}
    np.savez(tmp_path / "4.npz", **arrays)
    with pytest.raises(CompareError, match="damaged"):
        load_tokens(tmp_path / "4.npz")
