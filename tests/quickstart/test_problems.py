"""Generated word problems: format, arithmetic, splits, and the shape of the length distribution."""

import re

import pytest

from rl_accel.quickstart.problems import MAX_VALUE, generate
from rl_accel.quickstart.tokenizer import build_tokenizer

LINE = re.compile(r"[A-Z][a-z ]+ (\d+)([-+*])(\d+)=<<(\d+[-+*]\d+)=(\d+)>>(\d+) [a-z]+\.")
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


@pytest.fixture(scope="module")
def problems():
    return generate(10_000, seed=3)


def test_answers_have_gsm8k_format_and_are_right(problems):
    for problem in problems:
        *lines, last = problem.answer.split("\n")
        assert len(lines) == problem.num_steps
        assert problem.question.endswith("?")
        numbers = [int(number) for number in re.findall(r"\d+", problem.question)]
        value = numbers[0]
        for line, operand_in_question in zip(lines, numbers[1:], strict=True):
            left, operation, right, annotated, annotated_result, result = LINE.fullmatch(line).groups()
            assert annotated == f"{left}{operation}{right}"
            assert int(left) == value
            assert int(right) == operand_in_question
            value = OPERATIONS[operation](int(left), int(right))
            assert annotated_result == result == str(value)
            assert 2 <= value <= MAX_VALUE
        assert last == f"#### {value}"


def test_all_step_counts_occur(problems):
    assert {problem.num_steps for problem in problems} == set(range(1, 13))


def test_same_seed_same_problems_and_longer_lists_extend_shorter_ones():
    assert generate(300, seed=5) == generate(500, seed=5)[:300]
    assert generate(50, seed=5) != generate(50, seed=6)


def test_splits_are_disjoint_and_questions_and_ids_distinct(problems):
    train_questions = {problem.question for problem in problems}
    test_questions = {problem.question for problem in generate(10_000, seed=3, split="test")}
    assert len(train_questions) == len(test_questions) == 10_000
    assert not train_questions & test_questions
    assert len({problem.problem_id for problem in problems}) == 10_000


@pytest.mark.parametrize(("num_problems", "split"), [(1, "validation"), (-1, "train")])
def test_bad_arguments_are_refused(num_problems, split):
    with pytest.raises(ValueError, match="got"):
        generate(num_problems, seed=0, split=split)


def test_lengths_are_long_tailed_and_bounded(problems):
    tokenizer = build_tokenizer()
    answer_lengths = sorted(map(len, tokenizer([problem.answer for problem in problems]).input_ids))
    prompt_lengths = sorted(map(len, tokenizer([problem.question for problem in problems]).input_ids))
    assert answer_lengths[9_900] >= 4 * answer_lengths[5_000]
    assert 25 <= answer_lengths[5_000] <= 45
    assert answer_lengths[-1] < 300
    assert prompt_lengths[5_000] < 60
    assert prompt_lengths[-1] < 230
