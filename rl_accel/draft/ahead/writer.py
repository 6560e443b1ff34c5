"""Texts that a small language model writes on, token by token, and takes back where the policy writes otherwise.

A text's own noise (`kernels/gumbel_argmax`) is that of the policy's exact sampling, so that a draft agrees as often as
it can (Gumbel coupling: Daliri, Musco, Suresh 2024, arXiv 2408.07978). Each text has a key-value cache of its own that
is cut back to what still holds. Cost: a forward pass of one row a token (`lean.py`).
Left out: several texts in one pass; penalties and masks, which only cost agreement.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from rl_accel.draft.ahead.lean import Cache, Model
from rl_accel.draft.ahead.messages import Sampling
from rl_accel.kernels.gumbel_argmax.reference import gumbel_noise

NOISE_BLOCK = 16
"""Positions whose noise is made in one go."""


class Text:
    """A text: what the policy has written, and behind it what the model drafted."""

    def __init__(self, cache: Cache, ids: Sequence[int], sampling: Sampling, limit: int):
        """
        Args:
            cache: without tokens.
            ids: prompt and what the policy has written of the response.
            limit: no token is drafted behind this many.
        """
        self.ids, self.num_verified = list(ids), len(ids)
        self.sampling, self.limit = sampling, limit
        self.num_read = 0
        """Packets about what was verified."""
        self._cache = cache
        self._noise: torch.Tensor | None = None
        self._noise_start = 0

    @property
    def num_ahead(self) -> int:
        return len(self.ids) - self.num_verified

    def verify(self, position: int, tokens: Sequence[int]) -> None:
        """Take what the policy wrote from a position on, which no packet has named before."""
        for index, token in enumerate(tokens, position):
            if index < len(self.ids) and self.ids[index] != token:
                self._cut(index)
            if index == len(self.ids):
                self.ids.append(int(token))
        self.num_verified = position + len(tokens)

    def _cut(self, length: int) -> None:
        del self.ids[length:]
        self._cache.cut(length)

    @torch.inference_mode()
    def write(self, model: Model, vocab_size: int | None = None) -> int:
        """Append a token, one of the first `vocab_size`, and return it."""
        logits_V = model.logits(self.ids[self._cache.length :], self._cache)[:vocab_size]
        if self.sampling.temperature > 0.0:
            logits_V = _filtered(logits_V / self.sampling.temperature, self.sampling)
            logits_V = logits_V + self._noise_of(len(self.ids), len(logits_V))
        token = int(logits_V.argmax())
        self.ids.append(token)
        return token

    def _noise_of(self, position: int, vocab_size: int) -> torch.Tensor:
        if self._noise is None or not self._noise_start <= position < self._noise_start + NOISE_BLOCK:
            positions = torch.arange(position, position + NOISE_BLOCK)
            keys = torch.full((NOISE_BLOCK,), self.sampling.key, dtype=torch.int64)
            self._noise, self._noise_start = gumbel_noise(keys, positions, vocab_size), position
        return self._noise[position - self._noise_start]


def _filtered(logits_V: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return logits without the tokens that top-k and top-p leave out."""
    if 0 < sampling.top_k < len(logits_V):
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.top_p < 1.0:
        ascending_V, order_V = logits_V.sort()
        left_out_V = ascending_V.softmax(-1).cumsum(-1) <= 1.0 - sampling.top_p
        left_out_V[-1] = False
        logits_V = logits_V.masked_fill(torch.zeros_like(left_out_V).scatter(0, order_V, left_out_V), -torch.inf)
    return logits_V


class Writer:
    """Texts by number, and whose turn it is."""

    def __init__(self, model: Model, stop_token_ids: Collection[int], max_ahead: int, vocab_size: int | None = None):
        """
        Args:
            vocab_size: of the policy; models of one tokenizer are padded to different sizes.
            max_ahead: tokens that a text is written ahead of what is verified.
        """
        self.model, self.stops, self.max_ahead = model, frozenset(stop_token_ids), max_ahead
        self.vocab_size = vocab_size
        self.texts: dict[int, Text] = {}

    def begin(self, number: int, ids: Sequence[int], sampling: Sampling, limit: int) -> None:
        """Take a text, as `Text` says."""
        self.texts[number] = Text(self.model.new_cache(), ids, sampling, min(limit, self.model.max_length))

    def end(self, number: int) -> None:
        """Forget a text."""
        self.texts.pop(number, None)

    def next(self) -> int | None:
        """Return the text that is written ahead least, None if all are far enough."""
        numbers = [number for number, text in self.texts.items() if self._may_write(text)]
        return min(numbers, key=lambda number: self.texts[number].num_ahead, default=None)

    def write(self, number: int) -> int:
        """Append a token to a text and return it."""
        return self.texts[number].write(self.model, self.vocab_size)

    def _may_write(self, text: Text) -> bool:
        return (
            text.num_ahead < self.max_ahead
            and len(text.ids) < text.limit
            and (text.num_ahead == 0 or text.ids[-1] not in self.stops)
        )
