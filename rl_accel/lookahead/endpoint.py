"""An engine behind vLLM's token endpoint, `/inference/v1/generate`, which verl's rollout servers have, too.

Token ids go in and come out, so nothing is tokenized again. A step ends at a delimiter or an end token, which the
engine is given as `stop_token_ids`. Cancelling a step closes its connection, which ends the request in the engine.

Host symbols: vLLM's protocol `GenerateRequest`, `GenerateResponse` (entrypoints/scale_out/token_in_token_out).
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rl_accel.errors import EngineRefusesError, LookaheadError
from rl_accel.identity import FIELD, hash64
from rl_accel.lookahead.step import Step

if TYPE_CHECKING:
    import aiohttp

PATH = "/inference/v1/generate"
MAX_ERROR_CHARS = 300
MAX_CALL = (1 << 63) - 1
KEEP_ALIVE_S = 2.0
"""Of an idle connection; vLLM closes them after 5 seconds, and a request that meets that moment fails."""


def open_session(total_s: float | None = None) -> aiohttp.ClientSession:
    """Return a session to vLLM servers, without a limit on connections; it is opened in the running event loop.

    Args:
        total_s: seconds of a request, None: as long as it takes.
    """
    import aiohttp

    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=total_s, sock_connect=10),
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
    )


class TokenEndpoint:
    """Writes steps of one text; sessions and their limits are the caller's."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        sampling: Mapping[str, Any],
        *,
        delimiters: Collection[int],
        end_token_ids: Collection[int],
        model: str | None = None,
        takes_hints: bool = False,
    ):
        """
        Args:
            url: of the server, without a path.
            sampling: vLLM's sampling parameters as JSON; of two engines the same ones, `extra_args` included, if their
                noise is to be the same.
            delimiters: tokens that end a step.
            end_token_ids: tokens that end a text.
            takes_hints: whether the engine drafts with `extra_args["rl_accel"]["hint"]`.

        Raises:
            LookaheadError: for parameters that cut a text otherwise than by tokens, or make several of it.
        """
        unfit = [name for name in ("stop", "min_tokens", "best_of") if sampling.get(name)]
        unfit += ["n"] if sampling.get("n", 1) != 1 else []
        if unfit:
            raise LookaheadError(f"lookahead decodes one text by token ids; it does not serve {', '.join(unfit)}")
        self.session, self.base_url, self.model, self.takes_hints = session, url.rstrip("/"), model, takes_hints
        self.url = self.base_url + PATH
        self.delimiters, self.end_token_ids = frozenset(delimiters), frozenset(end_token_ids)
        self.sampling = {
            **sampling,
            "detokenize": False,
            "stop_token_ids": sorted({*self.delimiters, *self.end_token_ids, *(sampling.get("stop_token_ids") or ())}),
        }

    async def step(
        self, prefix_ids: Sequence[int], max_tokens: int, *, branch: int = 0, hint: Sequence[int] = ()
    ) -> Step:
        """As `Engine.step`.

        Raises:
            EngineRefusesError: if the server refuses the request as it stands.
            LookaheadError: if it answers what is no step.
        """
        body = {
            # Begins with a letter: `7_x` would be read as the seventh sample of a request, and get its noise.
            "request_id": f"lookahead-{uuid.uuid4().hex}",
            "token_ids": list(prefix_ids),
            "sampling_params": {**self.sampling, "max_tokens": max_tokens, **self._extra(branch, hint)},
        }
        return self._step_of(await self._post(body), max_tokens)

    async def score(self, prefix_ids: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        """Return the log-prob of each token of a continuation, in nats, by one prefill that nothing is cached of.

        They are those of the model itself, whatever the sampling parameters make of them.

        Raises:
            LookaheadError: if the server refuses, or answers others.
        """
        sampling = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}
        body = {
            "request_id": f"score-{uuid.uuid4().hex}",
            "token_ids": [*prefix_ids, *token_ids],
            "sampling_params": sampling,
        }
        found = (await self._post(body)).get("prompt_logprobs") or []
        try:
            wanted = zip(token_ids, found[len(prefix_ids) :], strict=True)
            return [float(entry[str(token)]["logprob"]) for token, entry in wanted]
        except (KeyError, TypeError, ValueError) as error:
            raise LookaheadError(f"{self.url} answers no log-probs of the prompt's tokens: {error!r}") from error

    async def _post(self, body: dict[str, Any]) -> Mapping[str, Any]:
        if self.model is not None:
            body["model"] = self.model
        async with self.session.post(self.url, json=body) as response:
            if response.status != 200:
                text = (await response.text())[:MAX_ERROR_CHARS]
                kind = EngineRefusesError if response.status in (400, 422) else LookaheadError
                raise kind(f"{self.url} answers {response.status}: {text}")
            return await response.json()

    def _extra(self, branch: int, hint: Sequence[int]) -> dict[str, Any]:
        extra = self.sampling.get("extra_args") or {}
        identity = extra.get(FIELD)
        if identity is None or not (branch or (hint and self.takes_hints)):
            return {}
        if branch:  # noise of its own
            identity = {**identity, "call": hash64(f"{identity.get('call', 0)}/{branch}".encode()) & MAX_CALL}
        if hint and self.takes_hints:
            identity = {**identity, "hint": list(hint)}
        return {"extra_args": {**extra, FIELD: identity}}

    def _step_of(self, answer: Mapping[str, Any], max_tokens: int) -> Step:
        try:
            choice = answer["choices"][0]
            token_ids = tuple(choice["token_ids"])
            logprobs = tuple(entry["logprob"] for entry in (choice.get("logprobs") or {}).get("content") or ())
        except (KeyError, IndexError, TypeError) as error:
            raise LookaheadError(f"{self.url} answers no tokens: {str(answer)[:MAX_ERROR_CHARS]}") from error
        reason = choice.get("finish_reason")
        if not token_ids or len(token_ids) > max_tokens or reason not in ("stop", "length"):
            raise LookaheadError(f"{self.url}: {len(token_ids)} of {max_tokens} tokens, ended by {reason}")
        end = token_ids[-1] in self.end_token_ids or (reason == "stop" and token_ids[-1] not in self.delimiters)
        return Step(token_ids, end=end, whole=end or token_ids[-1] in self.delimiters, logprobs=logprobs)
