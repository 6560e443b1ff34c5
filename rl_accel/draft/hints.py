"""Texts that a request may begin with, as its sender supposes: `extra_args["rl_accel"]["hint"]`, token ids.

Lookahead sends the smaller model's step so. A hint is offered as the draft while the text follows it, and forgotten
with the first token that does not. Cost: one comparison per request and step, none for requests without a hint.
Source: ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_accel.identity import FIELD

HINT = "hint"
NO_LIMIT = 1 << 30


def hint_of(extra_args: Any, vocab_size: int) -> list[int]:
    """Return the hint that a request carries, [] without one.

    Raises:
        ValueError: for a hint that is no list of tokens of the vocabulary.
    """
    carried = extra_args.get(FIELD) if isinstance(extra_args, Mapping) else None
    hint = carried.get(HINT) if isinstance(carried, Mapping) else None
    if hint is None:
        return []
    if not isinstance(hint, (list, tuple)) or not all(type(token) is int and 0 <= token < vocab_size for token in hint):
        raise ValueError(f"{HINT}: expected token ids below {vocab_size}")
    return list(hint)


class Hints:
    """The hints of live requests, by request id."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self._hints: dict[str, tuple[int, int, npt.NDArray[np.int32]]] = {}
        """Request -> tokens of its prompt, tokens of prompt and response at most, hint."""
        self.num_offered = 0
        """Tokens since they were last asked for."""

    def begin(self, name: str, num_prompt_tokens: int, extra_args: Any, max_tokens: int = NO_LIMIT) -> None:
        """Keep the hint of a request, if it has one.

        Args:
            max_tokens: longest response.

        Raises:
            ValueError: for a hint that is no list of tokens of the vocabulary.
        """
        if hint := hint_of(extra_args, self.vocab_size):
            self._hints[name] = num_prompt_tokens, num_prompt_tokens + max_tokens, np.array(hint, np.int32)

    def end(self, name: str) -> None:
        """Forget a request; it may have none."""
        self._hints.pop(name, None)

    def __len__(self) -> int:
        return len(self._hints)

    def __contains__(self, name: str) -> bool:
        return name in self._hints

    def length(self, name: str) -> int:
        return len(self._hints[name][2])

    def take_offered(self) -> int:
        """Return and reset how many tokens were offered."""
        offered, self.num_offered = self.num_offered, 0
        return offered

    def draft(self, name: str, text: npt.NDArray[np.int32], max_draft: int) -> list[int]:
        """Return what the hint says next, at most `max_draft` tokens; [] once the text has left it.

        A draft stops a token before the longest response: the target adds one.

        Args:
            text: int32 [T], prompt and response so far.
        """
        num_prompt_tokens, max_length, hint = self._hints[name]
        room = min(max_draft, max_length - len(text) - 1)
        if room <= 0:
            return []
        written = text[num_prompt_tokens:]
        if len(written) >= len(hint) or not np.array_equal(written, hint[: len(written)]):
            self.end(name)
            return []
        found = hint[len(written) : len(written) + room].tolist()
        self.num_offered += len(found)
        return found
