"""The verifier `likelihood`: the target finds the draft's step about as likely as its own.

Compared are log-probs of the model itself, summed over the tokens of a step from the first one in which the two differ:
before temperature, top-p, top-k and penalties, whatever the sampling parameters are. The draft's come from a prefill.
The own step's come with the step where nothing in the sampling parameters changes log-probs (temperature 0 or 1,
nothing cut or penalized). Elsewhere an engine may report them before or after sampling parameters (`logprobs_mode`, raw
by default and processed under verl) and does not tell which, so they come from a second prefill. `*_logits` modes
report no log-probs and cannot serve.

A bias, not a free gain: a draft that is likelier than the sample always agrees, so answers at temperature 1 are cooler
than the target's.

Cost: one request of prefix and step, or two beside each other. vLLM reads no prefix cache for `prompt_logprobs`, so the
whole prefix is computed again; the first such request of an engine takes seconds, on a CPU up to a minute.

Source: acceptance by the target's likelihood, Lookahead Reasoning (arXiv 2506.19830) has it as a scoring verifier;
differs: relative to the own step, no absolute threshold.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp

from rl_accel.lookahead.endpoint import TokenEndpoint
from rl_accel.lookahead.model_verifier import ModelVerifier
from rl_accel.lookahead.step import Step

MARGIN = 1.0
"""Nats."""
TIMEOUT_S = 120.0
UNCHANGED: Mapping[str, tuple[Any, ...]] = {
    "temperature": (0, 1), "top_p": (1,), "top_k": (0, -1), "min_p": (0,), "presence_penalty": (0,),
    "frequency_penalty": (0,), "repetition_penalty": (1,),
}  # fmt: skip
"""Values of vLLM's sampling parameters that leave log-probs as they are; greedy decoding applies no temperature."""
MASKS = ("logit_bias", "bad_words", "allowed_token_ids", "min_tokens", "structured_outputs", "thinking_token_budget")


class Likelihood(ModelVerifier):
    """Agrees if log p(draft's step) >= log p(own step) - margin."""

    needs_logprobs = True

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        sampling: Mapping[str, Any],
        margin: float = MARGIN,
        *,
        model: str | None = None,
        timeout_s: float = TIMEOUT_S,
    ):
        """
        Args:
            url: of the target, without a path.
            sampling: with which the target writes its steps, as JSON; ask it for `logprobs`, or every verdict takes two
                prefills.
            margin: nats that a draft's step may be less likely than the target's own.
            timeout_s: seconds; the first request of an engine is slow.
        """
        self._target = TokenEndpoint(session, url, {}, delimiters=(), end_token_ids=(), model=model)
        super().__init__(session, self._target.url, timeout_s)
        self.margin, self._takes_own = margin, leaves_logprobs(sampling)

    def with_sampling(self, sampling: Mapping[str, Any]) -> Likelihood:
        """Return one for a text of other sampling parameters that adds to the same `cost`."""
        found = copy.copy(self)
        found._takes_own = leaves_logprobs(sampling)
        return found

    async def _compare(self, prefix_ids: Sequence[int], draft: Step, target: Step) -> bool:
        steps = [draft]
        if not (self._takes_own and len(target.logprobs) == len(target.token_ids)):
            steps.append(target)
        tasks = [asyncio.ensure_future(self._score(prefix_ids, step)) for step in steps]
        try:
            drafts, *scored = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        own = scored[0] if scored else target.logprobs
        at = _first_difference(draft.token_ids, target.token_ids)
        return sum(drafts[at:]) >= sum(own[at:]) - self.margin

    async def _score(self, prefix_ids: Sequence[int], step: Step) -> Sequence[float]:
        self.cost.tokens += len(prefix_ids) + len(step.token_ids)
        return await self._target.score(prefix_ids, step.token_ids)


def leaves_logprobs(sampling: Mapping[str, Any]) -> bool:
    """Return whether log-probs are the same before and after these sampling parameters."""
    if any(sampling.get(name) for name in MASKS):
        return False
    return all(sampling.get(name) in (None, *values) for name, values in UNCHANGED.items())


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
