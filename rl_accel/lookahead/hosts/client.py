"""What an agent loop generates with where lookahead is on: verl's client, whose texts are written step by step.

Steps go to the rollout server that verl's load balancer names, by its HTTP port: cancelling a step there ends the
request in the engine, which verl's way by Ray does not. A text that cannot be written so goes verl's way, and so does
one that fails: with exact sampling it is the same text.

Host symbols (verl 0.9.1): `LLMServerClient._acquire_server`, whose name of a server is its HTTP address,
`_release_server`; `vLLMHttpServer.generate`, whose limits and defaults are repeated here; `TokenOutput`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from verl.utils import normalize_token_ids
from verl.workers.rollout.replica import TokenOutput

from rl_accel.errors import LookaheadError
from rl_accel.identity import FIELD
from rl_accel.lookahead.core import Limits, Lookahead
from rl_accel.lookahead.endpoint import TokenEndpoint
from rl_accel.lookahead.switch import Text

if TYPE_CHECKING:
    from rl_accel.lookahead.hosts.agent_loop import LookaheadAgentLoop

logger = logging.getLogger(__name__)

MEDIA = ("image_data", "video_data", "audio_data")
NOT_JSON = ("output_kind", "detokenize", "logprobs", "max_tokens", "max_new_tokens")
"""Sampling parameters that do not travel: set here, or by the endpoint."""


class LookaheadClient:
    """The client of one session; everything but `generate` is the inner client's."""

    def __init__(self, client: Any, role: LookaheadAgentLoop, validate: bool):
        self._client, self._role, self._validate = client, role, validate
        self.generated: list[tuple[list[int], list[bool]]] = []
        """Of each generation in order: tokens, and which of them a draft wrote in the policy's stead."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_client" not in self.__dict__:  # asked while it is being copied
            raise AttributeError(name)
        return getattr(self._client, name)

    async def generate(
        self, request_id: str, *, prompt_ids: Any, sampling_params: Mapping[str, Any], **kwargs: Any
    ) -> TokenOutput:
        """As verl's. The text is written with drafts where that is allowed, possible, and measured to be faster."""
        role = self._role
        counts = role.counts[self._validate]
        counts["texts"] += 1
        text = role.switch.begin()
        started, output = time.monotonic(), None
        try:
            if text.drafts and not any(kwargs.get(name) for name in MEDIA):
                output = await self._write(text, request_id, normalize_token_ids(prompt_ids), sampling_params)
            if output is None:
                text.drafts = False
                output = await self._client.generate(
                    request_id, prompt_ids=prompt_ids, sampling_params=dict(sampling_params), **kwargs
                )
                self.generated.append((list(output.token_ids), [False] * len(output.token_ids)))
            return output
        finally:
            text.end(len(output.token_ids) if output is not None else 0, time.monotonic() - started)

    async def _write(
        self, text: Text, request_id: str, prompt_ids: list[int], sampling_params: Mapping[str, Any]
    ) -> TokenOutput | None:
        """Return the text, or None for one to write without drafts."""
        role, counts = self._role, self._role.counts[self._validate]
        server_id, _ = await self._client._acquire_server(
            request_id, prompt_ids=prompt_ids, sampling_params=sampling_params
        )
        try:
            counts["drafted_texts"] += 1
            session = role.session()
            target = self._endpoint(session, f"http://{server_id}", sampling_params, logprobs=True)
            draft = self._endpoint(session, await role.draft_url(), sampling_params, logprobs=False)
            written = await self._steps(text, target, draft, prompt_ids, role.limits(len(prompt_ids), sampling_params))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            counts["failed_texts"] += 1
            role.warn_once(error)
            return None
        finally:
            self._client._release_server(server_id, request_id)
            for name in ("target_steps", "draft_steps", "late_drafts", "drafts_lost"):
                counts[name] += getattr(text.counts, name)
        return written

    def _endpoint(self, session: Any, url: str, sampling_params: Mapping[str, Any], logprobs: bool) -> TokenEndpoint:
        role = self._role
        sampling: dict[str, Any] = {**role.defaults}
        sampling.update({name: value for name, value in sampling_params.items() if name not in NOT_JSON})
        if logprobs and (sampling_params.get("logprobs") or not role.settings.lossless):
            sampling["logprobs"] = 0
        return TokenEndpoint(
            session, url, sampling, delimiters=role.delimiters, end_token_ids=role.end_token_ids,
            takes_hints=role.settings.hint,
        )  # fmt: skip

    async def _steps(
        self, text: Text, target: TokenEndpoint, draft: TokenEndpoint, prompt_ids: list[int], limits: Limits
    ) -> TokenOutput:
        role, counts = self._role, self._role.counts[self._validate]
        verifier = role.verifier(target)
        core = Lookahead(
            target, draft, verifier, limits, text.depth,
            width=role.settings.width, hint=role.settings.hint, counts=text.counts,
        )  # fmt: skip
        token_ids: list[int] = []
        logprobs: list[float] = []
        from_draft: list[bool] = []
        async with aclosing(core.steps(prompt_ids)) as steps:
            async for final in steps:
                num_tokens = len(final.step.token_ids)
                token_ids += final.step.token_ids
                drafted = final.from_draft and not verifier.lossless
                from_draft += [drafted] * num_tokens
                logprobs += [0.0] * num_tokens if drafted else final.step.logprobs  # filled in below
                counts["steps"] += 1
                counts["steps_from_draft"] += final.from_draft
        log_probs = None
        if "logprobs" in target.sampling:
            if len(logprobs) != len(token_ids):
                raise LookaheadError(f"{len(token_ids)} tokens came with {len(logprobs)} log-probs")
            log_probs = logprobs
            if any(from_draft):
                scored = await target.score(prompt_ids, token_ids)
                log_probs = [new if flag else old for new, old, flag in zip(scored, logprobs, from_draft, strict=True)]
        self.generated.append((token_ids, from_draft))
        step = (target.sampling.get("extra_args") or {}).get(FIELD, {}).get("step")
        extra = {"global_steps": step, "min_global_steps": step, "max_global_steps": step}
        return TokenOutput(
            token_ids=token_ids, log_probs=log_probs, stop_reason="completed", num_preempted=None, extra_fields=extra
        )


def mask_drafts(outputs: Sequence[Any], generated: Sequence[tuple[list[int], list[bool]]]) -> None:
    """Keep tokens that a draft wrote out of the loss: `response_mask` 0, as for a tool's words.

    Raises:
        LookaheadError: if a loop made something else of what was generated, so that it is not known which these are.
    """
    if not any(any(from_draft) for _, from_draft in generated):
        return
    written = [token for token_ids, _ in generated for token in token_ids]
    drafted = [flag for _, from_draft in generated for flag in from_draft]
    at = 0
    for output in outputs:
        own = [place for place, mask in enumerate(output.response_mask) if mask]
        if [output.response_ids[place] for place in own] != written[at : at + len(own)]:
            raise LookaheadError(
                "the agent loop trains on other tokens than were generated, so drafts in them cannot be left out of "
                "the loss; use rl_accel.lookahead.verifier=exact, or phases=validation"
            )
        for place, flag in zip(own, drafted[at : at + len(own)], strict=True):
            output.response_mask[place] = int(not flag)
        at += len(own)
