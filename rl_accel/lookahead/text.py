"""From token ids to text and back, as a proxy needs it: which tokens end a step, and text that grows by steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def delimiter_ids(tokenizer: Any, delimiter: str) -> list[int]:
    """Return every token whose text holds the delimiter: `.\\n` and `\\n\\n` may be tokens of their own."""
    return [token for token in sorted(tokenizer.get_vocab().values()) if delimiter in tokenizer.decode([token])]


class GrowingText:
    """Text of token ids that come in parts; a character whose bytes are not all there waits for the next part."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._text = ""

    def add(self, token_ids: Sequence[int], last: bool = False) -> str:
        """Return what these ids add to the text."""
        self._ids += token_ids
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if not last:
            text = text.rstrip(REPLACEMENT)
        added, self._text = text[len(self._text) :], text
        return added
