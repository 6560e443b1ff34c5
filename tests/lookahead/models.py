"""Models that are functions of the text before: the next token is a hash of it, the draft now and then says another."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence

from rl_accel.lookahead.step import Step

END_TOKEN, DELIMITERS = 99, range(0, 100, 9)


def mix(ids: Sequence[int], salt: int) -> int:
    return int.from_bytes(hashlib.blake2b(str((salt, tuple(ids))).encode(), digest_size=8).digest(), "little")


class HashModel:
    """Writes on a clock; counts what it was asked for and what is under way."""

    def __init__(self, seed: int = 0, wrong: float = 0.0, seconds: float = 0.1, fails_at: int = -1):
        self.seed, self.wrong, self.seconds, self.fails_at = seed, wrong, seconds, fails_at
        self.asked: list[tuple[int, ...]] = []
        self.hints: list[tuple[int, ...]] = []
        self.running = self.most_running = 0

    def next_token(self, ids: Sequence[int], branch: int = 0) -> int:
        token = mix(ids, self.seed) % 100
        if self.wrong and mix(ids, self.seed + 1 + branch) % 1000 < 1000 * self.wrong:
            token = (token + 1 + branch) % 100
        return token

    async def step(
        self, prefix_ids: Sequence[int], max_tokens: int, *, branch: int = 0, hint: Sequence[int] = ()
    ) -> Step:
        self.asked.append(tuple(prefix_ids))
        self.hints.append(tuple(hint))
        if len(self.asked) - 1 == self.fails_at:
            raise ConnectionError("the engine is gone")
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            ids = list(prefix_ids)
            for _ in range(max_tokens):
                await asyncio.sleep(self.seconds * (1 + mix(ids, 7) % 3))
                ids.append(self.next_token(ids, branch))
                if ids[-1] == END_TOKEN or ids[-1] in DELIMITERS:
                    return Step(tuple(ids[len(prefix_ids) :]), end=ids[-1] == END_TOKEN)
            return Step(tuple(ids[len(prefix_ids) :]), whole=False)
        finally:
            self.running -= 1


def plain(model: HashModel, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """What the model writes alone, token by token."""
    ids = list(prompt)
    while len(ids) - len(prompt) < max_tokens:
        ids.append(model.next_token(ids))
        if ids[-1] == END_TOKEN:
            break
    return ids[len(prompt) :]
