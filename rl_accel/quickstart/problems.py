"""Word problems in GSM8K's format, written by templates: one running number, one statement per step.

The format (question, calculator annotations ``<<12+7=19>>``, last line ``#### N``) is that of Cobbe et al.
2021, "Training Verifiers to Solve Math Word Problems"; every sentence here is our own. All numbers lie in
2..``MAX_VALUE``, so that a tokenizer can give each its own token. Left out: division, fractions, units, and
statements that do not matter. Cost: about 10 microseconds per reasoning step.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

MAX_VALUE = 99
"""Largest number that occurs in a question or an answer."""

STEP_WEIGHTS = (22, 31, 17, 9, 6, 4, 3, 2, 2, 1.5, 1.5, 1)
"""Relative frequency of problems with 1, 2, ... 12 reasoning steps: a median of 2 and a long tail."""

_TEST_SHARE = 10  # one question text in ten belongs to the test split

_PEOPLE = (
    ("Ana", "she"),
    ("Ben", "he"),
    ("Cora", "she"),
    ("Dan", "he"),
    ("Eva", "she"),
    ("Finn", "he"),
    ("Gina", "she"),
    ("Hugo", "he"),
)


@dataclass(frozen=True)
class Problem:
    """One word problem with its worked solution.

    question: the text put to the policy.
    answer: one line per reasoning step, then ``#### N``.
    num_steps: number of reasoning steps, 1 to 12.
    problem_id: ``<split>-<seed>-<index>``, unique within a split and seed.
    """

    question: str
    answer: str
    num_steps: int
    problem_id: str


@dataclass(frozen=True)
class _Theme:
    """Sentences of one kind of story.

    ``{who}`` is the owner, ``{they}``/``{They}`` the pronoun, ``{friend}`` someone else, ``{things}`` what is
    counted, ``{n}`` the operand. Lines end in ``{calc}``, for instance ``12+7=<<12+7=19>>19``.
    """

    things: tuple[str, ...]
    start: tuple[str, ...]
    statements: dict[str, tuple[str, ...]]
    ask: str
    lines: dict[str, str]


_THEMES = (
    _Theme(
        things=("apples", "books", "cards", "coins", "pens", "shells", "stamps", "toys"),
        start=("{who} has {n} {things}.", "{who} starts with {n} {things}."),
        statements={
            "+": (
                "{They} buys {n} more.",
                "{They} finds {n} {things}.",
                "{friend} brings {n} more {things}.",
                "Then {they} gets {n} from {friend}.",
            ),
            "-": (
                "{They} gives {n} to {friend}.",
                "{They} loses {n} {things}.",
                "Then {they} sells {n} of them.",
                "{friend} takes {n} {things}.",
            ),
            "*": ("Soon {they} has {n} times as many.",),
        },
        ask="How many {things} does {who} have now?",
        lines={
            "+": "{They} now has {calc} {things}.",
            "-": "That leaves {calc} {things}.",
            "*": "That makes {calc} {things}.",
        },
    ),
    _Theme(
        things=("dollars",),
        start=("{who} has {n} {things}.", "{who} saves {n} {things}."),
        statements={
            "+": ("{They} earns {n} {things}.", "{friend} pays back {n} {things}."),
            "-": ("{They} spends {n} {things}.", "Then {they} lends {n} to {friend}."),
            "*": ("Soon {they} has {n} times as much.",),
        },
        ask="How much money does {who} have now?",
        lines={
            "+": "{They} now has {calc} {things}.",
            "-": "That leaves {calc} {things}.",
            "*": "That makes {calc} {things}.",
        },
    ),
    _Theme(
        things=("riders",),
        start=("A bus leaves with {n} {things}.", "A train starts with {n} {things}."),
        statements={
            "+": ("At the next stop {n} get on.", "Then {n} more get on."),
            "-": ("At the next stop {n} get off.", "Then {n} {things} get off."),
            "*": ("Later there are {n} times as many.",),
        },
        ask="How many {things} are there now?",
        lines={
            "+": "There are {calc} {things}.",
            "-": "That leaves {calc} {things}.",
            "*": "That makes {calc} {things}.",
        },
    ),
)


def _draw_operation(rng: random.Random, value: int) -> tuple[str, int, int]:
    """Operation, operand and result, with the result within 2..MAX_VALUE (no "1 apples")."""
    while True:
        operation = rng.choices("+-*", weights=(44, 40, 16))[0]
        if operation == "*":
            operand = rng.randint(2, 4)
            result = value * operand
        else:
            operand = rng.randint(2, 9) if rng.random() < 0.7 else rng.randint(10, 25)
            result = value + operand if operation == "+" else value - operand
        if 1 < result <= MAX_VALUE:
            return operation, operand, result


def _write(rng: random.Random, num_steps: int) -> tuple[str, str]:
    """Question and answer of one problem with `num_steps` reasoning steps."""
    theme = rng.choices(_THEMES, weights=(3, 1, 1))[0]
    (who, they), (friend, _) = rng.sample(_PEOPLE, 2)
    words = {
        "who": who,
        "they": they,
        "They": they.capitalize(),
        "friend": friend,
        "things": rng.choice(theme.things),
    }
    value = rng.randint(2, 50)
    statements = [rng.choice(theme.start).format(n=value, **words)]
    lines = []
    for _ in range(num_steps):
        operation, operand, result = _draw_operation(rng, value)
        statements.append(rng.choice(theme.statements[operation]).format(n=operand, **words))
        expression = f"{value}{operation}{operand}"
        lines.append(theme.lines[operation].format(calc=f"{expression}=<<{expression}={result}>>{result}", **words))
        value = result
    statements.append(theme.ask.format(**words))
    return " ".join(statements), "\n".join([*lines, f"#### {value}"])


def generate(
    num_problems: int, seed: int, split: str = "train", step_weights: Sequence[float] = STEP_WEIGHTS
) -> list[Problem]:
    """Draw distinct problems; a question's text decides its split, so splits are disjoint for all seeds.

    Args:
        num_problems: how many, at least 0.
        seed: same seed and split, same problems; a longer list begins with the shorter one.
        split: "train" or "test".
        step_weights: relative frequency of problems with 1, 2, ... reasoning steps.

    Returns:
        `num_problems` problems, no question twice.

    Raises:
        ValueError: for another split or a negative number.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if num_problems < 0:
        raise ValueError(f"num_problems must be at least 0, got {num_problems}")
    rng = random.Random(f"{split}-{seed}")
    problems: list[Problem] = []
    seen: set[str] = set()
    while len(problems) < num_problems:
        num_steps = rng.choices(range(1, len(step_weights) + 1), weights=step_weights)[0]
        question, answer = _write(rng, num_steps)
        is_test = zlib.crc32(question.encode()) % _TEST_SHARE == 0
        if is_test == (split == "test") and question not in seen:
            seen.add(question)
            problems.append(Problem(question, answer, num_steps, f"{split}-{seed}-{len(problems)}"))
    return problems
