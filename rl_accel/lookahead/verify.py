"""Verifiers that need no model: `exact`, `numbers`, and two controls."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from rl_accel.lookahead.step import Step

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class Exact:
    """The same tokens. Lossless: the answer is the target's own."""

    lossless = True

    async def agree(self, prefix_ids: Sequence[int], draft: Step, target: Step) -> bool:
        return draft.token_ids == target.token_ids


class Numbers:
    """The same numbers in the same order, whatever the words. Lets in the draft's wording, and what it leads to."""

    lossless = False

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self.decode = decode

    async def agree(self, prefix_ids: Sequence[int], draft: Step, target: Step) -> bool:
        return self._numbers(draft) == self._numbers(target)

    def _numbers(self, step: Step) -> list[str]:
        return [found.replace(",", "") for found in NUMBER.findall(self.decode(step.token_ids))]


class Random:
    """A control: agrees with a probability, whatever the steps say."""

    lossless = False

    def __init__(self, probability: float, seed: int = 0):
        self.probability, self._random = probability, random.Random(seed)

    async def agree(self, prefix_ids: Sequence[int], draft: Step, target: Step) -> bool:
        return self._random.random() < self.probability


class Always:
    """A control: what the draft says goes."""

    lossless = False

    async def agree(self, prefix_ids: Sequence[int], draft: Step, target: Step) -> bool:
        return True
