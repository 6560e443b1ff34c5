"""What tests of drafting share: a drafter that has seen something, and snapshots of it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rl_accel.draft import DraftConfig, SuffixDrafter


def _teach(drafter: SuffixDrafter, problem: str | int, text: list[int], keep: bool = True) -> None:
    """Let a request of the problem sample `text`."""
    drafter.begin("teacher", problem, [1])
    drafter.propose(["teacher"], [text], 0)
    drafter.end("teacher", keep=keep)


class History:
    """Makes, reads and opens drafters with a history."""

    CONFIG = DraftConfig(method="das", policy="fixed", cross_problems=False)
    TOKENIZER = 77
    teach = staticmethod(_teach)

    @staticmethod
    def read_through(drafter: SuffixDrafter, problem: str, text: list[int]) -> list[list[int]]:
        """Return the drafts of a request that samples `text`, a token a step."""
        drafter.begin("reader", problem, [1])
        drafts = [drafter.propose(["reader"], [[token]], 8)[0] for token in text]
        drafter.end("reader", keep=False)
        return drafts

    @classmethod
    def taught(cls, epochs: int = 3, seed: int = 0) -> SuffixDrafter:
        """Two problems in every epoch, steps with times, and predictions that were right and wrong."""
        drafter, rng = SuffixDrafter(cls.CONFIG, tokenizer=cls.TOKENIZER), random.Random(seed)
        for epoch in range(epochs):
            for problem in "ab":
                text = [rng.randrange(6) for _ in range(200)]
                cls.teach(drafter, problem, text)
                cls.read_through(drafter, problem, text[:50])
            for _ in range(100):
                drafter.observe_step(rng.uniform(0.01, 0.02), rng.randint(1, 9), rng.randint(0, 9))
            drafter.close_epoch(epoch, policy_version=10 * epoch)
        return drafter

    @classmethod
    def open(cls, path: Path, tokenizer: int = TOKENIZER) -> SuffixDrafter:
        return SuffixDrafter.open(path, cls.CONFIG, tokenizer=tokenizer)


@pytest.fixture(scope="session")
def teach() -> Callable[..., None]:
    return _teach


@pytest.fixture(scope="session")
def history() -> type[History]:
    return History


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """A snapshot that nobody changes."""
    path = tmp_path_factory.mktemp("history") / "snapshot"
    History.taught().save(path)
    return path


@pytest.fixture
def snapshot(saved, tmp_path) -> Path:
    """A snapshot of the test's own."""
    return Path(shutil.copytree(saved, tmp_path / "snapshot"))
