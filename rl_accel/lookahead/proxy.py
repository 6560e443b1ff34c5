"""An OpenAI-compatible server in front of two vLLM servers: the target answers, the draft writes ahead.

Serves `/v1/chat/completions` and `/v1/completions`, whole or streamed, `/v1/models`, `/health` and `/metrics`. With
`exact`, and exact sampling in both servers, answers are the target's own; a request without a seed gets one. The last
chunk and every whole answer say how many steps came from the draft.

Refused with a message: several answers, stop strings, tools, log-probs, penalties; bodies and texts that are too long;
more requests than may run. Nothing is kept of a request that has ended or whose client has gone.

Host symbols: FastAPI and Starlette, which vLLM depends on.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect

from rl_accel.errors import EngineRefusesError, LookaheadError, RLAccelError
from rl_accel.identity import FIELD
from rl_accel.lookahead.core import FinalStep, Limits, Lookahead
from rl_accel.lookahead.endpoint import TokenEndpoint, open_session
from rl_accel.lookahead.step import Cost, Verifier
from rl_accel.lookahead.switch import Switch, Text
from rl_accel.lookahead.text import GrowingText
from rl_accel.lookahead.verifiers import for_sampling

REFUSED = (
    "stop", "tools", "tool_choice", "functions", "logprobs", "top_logprobs", "logit_bias", "presence_penalty",
    "frequency_penalty", "response_format", "echo", "suffix",
)  # fmt: skip
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
COUNTERS = {
    "requests": "requests that were taken",
    "refused": "requests that were refused",
    "cancelled": "requests whose client went away",
    "failed": "requests that the target failed",
    "steps": "steps of answers",
    "draft_steps": "steps of answers that a draft stands in for",
    "tokens": "tokens of answers",
    "target_steps": "steps begun by the target",
    "drafts_lost": "requests that went on without drafts, as the draft server failed",
}
VERIFIER_COUNTERS = {
    "calls": "verdicts for which a model was asked",
    "seconds": "seconds from question to verdict, of all verdicts",
    "failures": "verdicts without a usable answer; not agreed",
    "tokens": "tokens that the model was sent",
}
"""Of a verifier that asks a model: name -> help. They are the fields of `Cost`."""


@dataclass(frozen=True)
class Settings:
    """Of a proxy."""

    target: str
    """URL of the server that answers."""
    draft: str
    """URL of the server that writes ahead."""
    model: str
    """Its name for clients."""
    delimiters: tuple[int, ...]
    end_token_ids: tuple[int, ...]
    max_tokens: int = 4096
    """Of an answer."""
    max_prompt_tokens: int = 32768
    step_tokens: int = 256
    width: int = 1
    """Drafts of the next step."""
    hint: bool = False
    """The target is given each draft as its token draft."""
    max_requests: int = 64
    """At a time; more are refused with 429."""
    max_body: int = 4 << 20
    """Bytes."""
    api_key: str = ""
    """Clients must send it; empty: nobody is asked."""


class _Refused(RLAccelError):
    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


class Proxy:
    """Requests of one app; `counts` are what `/metrics` shows."""

    def __init__(
        self, settings: Settings, tokenizer: Any, make_verifier: Callable[..., Verifier], switch: Switch
    ):  # fmt: skip
        """
        Args:
            make_verifier: called once, with `session`.
        """
        self.settings, self.tokenizer, self.make_verifier, self.switch = settings, tokenizer, make_verifier, switch
        self.verifier: Verifier | None = None
        self.counts: Counter[str] = Counter({name: 0 for name in COUNTERS})
        self.active = 0
        self.session: aiohttp.ClientSession | None = None

    def app(self) -> FastAPI:
        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            async with open_session() as self.session:
                self.verifier = self.make_verifier(session=self.session)
                yield

        app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        app.add_api_route("/v1/completions", self.completions, methods=["POST"])
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_api_route("/metrics", self.metrics, methods=["GET"])
        return app

    # Routes.

    async def chat(self, request: Request) -> Response:
        return await self._serve(request, is_chat=True)

    async def completions(self, request: Request) -> Response:
        return await self._serve(request, is_chat=False)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": self.settings.model, "object": "model"}]})

    async def health(self, request: Request) -> Response:
        """200 where the target is; a draft server that is not there makes nothing wrong."""
        assert self.session is not None
        try:
            async with self.session.get(
                f"{self.settings.target.rstrip('/')}/health", timeout=aiohttp.ClientTimeout(total=5)
            ) as answer:
                return Response(status_code=200 if answer.status == 200 else 503)
        except (aiohttp.ClientError, TimeoutError):
            return Response(status_code=503)

    async def metrics(self, request: Request) -> Response:
        lines = []
        for name, help_ in COUNTERS.items():
            full = f"rl_accel_lookahead_{name}_total"
            lines += [f"# HELP {full} {help_}", f"# TYPE {full} counter", f"{full} {self.counts[name]}"]
        lines += _cost_lines(getattr(self.verifier, "cost", None))
        lines += [
            "# TYPE rl_accel_lookahead_requests_running gauge",
            f"rl_accel_lookahead_requests_running {self.active}",
        ]
        lines += ["# HELP rl_accel_lookahead_gain speed-up by drafts at so many requests at a time, where measured"]
        lines += ["# TYPE rl_accel_lookahead_gain gauge"]
        lines += [f'rl_accel_lookahead_gain{{requests="{n}"}} {gain:.4f}' for n, gain in self.switch.gains().items()]
        return PlainTextResponse("\n".join(lines) + "\n")

    # Requests.

    async def _serve(self, request: Request, is_chat: bool) -> Response:
        try:
            self._check_key(request)
            body = await self._body(request)
            prompt = self._prompt(body, is_chat)
            if self.active >= self.settings.max_requests:
                raise _Refused(f"{self.active} requests are running, which is as many as there may be", 429)
            target, draft = self._engines(body)
            limits = self._limits(body)
        except _Refused as error:
            self.counts["refused"] += 1
            return _error(error.status, str(error))
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        self.counts["requests"] += 1
        answer = _Answer(self, body, is_chat, prompt, limits, target, draft)
        if body.get("stream"):
            return StreamingResponse(answer.stream(), media_type="text/event-stream")
        return await answer.whole(request)

    def _check_key(self, request: Request) -> None:
        key = self.settings.api_key
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key and not hmac.compare_digest(given.encode(), key.encode()):
            raise _Refused("the API key is missing or wrong", 401)

    async def _body(self, request: Request) -> dict[str, Any]:
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > self.settings.max_body:
                raise _Refused(f"the request is longer than {self.settings.max_body} bytes", 413)
        try:
            body = json.loads(bytes(data))
        except (ValueError, RecursionError) as error:
            raise _Refused(f"the request is no JSON: {error}") from None
        if not isinstance(body, dict):
            raise _Refused("the request is no JSON object")
        unfit = [name for name in REFUSED if body.get(name)] + (["n"] if body.get("n", 1) != 1 else [])
        if unfit:
            raise _Refused(f"lookahead does not serve {', '.join(unfit)}")
        if body.get("model", self.settings.model) != self.settings.model:
            raise _Refused(f"the model is {self.settings.model}", 404)
        return body

    def _prompt(self, body: Mapping[str, Any], is_chat: bool) -> list[int]:
        try:
            if is_chat:
                found = self.tokenizer.apply_chat_template(
                    body["messages"], add_generation_prompt=True, return_dict=True, tokenize=True
                )["input_ids"]
            elif isinstance(body["prompt"], str):
                found = self.tokenizer(body["prompt"])["input_ids"]
            else:
                found = body["prompt"]
            vocabulary = len(self.tokenizer)
            if not found or not all(type(token) is int and 0 <= token < vocabulary for token in found):
                raise ValueError("it is neither text nor token ids of one prompt")
        except Exception as error:  # whatever a chat template says of messages that it cannot write
            raise _Refused(f"the prompt cannot be read: {type(error).__name__}: {error}") from None
        if len(found) > self.settings.max_prompt_tokens:
            raise _Refused(f"the prompt has {len(found)} tokens; at most {self.settings.max_prompt_tokens} are served")
        return list(found)

    def _engines(self, body: Mapping[str, Any]) -> tuple[TokenEndpoint, TokenEndpoint]:
        sampling: dict[str, Any] = {}
        for name, default in SAMPLING.items():
            value = body.get(name)
            sampling[name] = default if value is None else value
            if not isinstance(sampling[name], (int, float)) or isinstance(sampling[name], bool):
                raise _Refused(f"{name} is no number")
        seed = body.get("seed")
        if seed is not None and type(seed) is not int:
            raise _Refused("seed is no integer")
        name = f"seed/{seed}" if seed is not None else uuid.uuid4().hex
        # One identity in both servers: the same noise, so a draft agrees as often as it can.
        sampling["extra_args"] = {FIELD: {"problem_id": name, "sample_index": 0, "step": 0, "validate": False}}
        own = {"logprobs": 0} if getattr(self.verifier, "needs_logprobs", False) else {}
        assert self.session is not None
        target, draft = (
            TokenEndpoint(
                self.session, url, {**sampling, **more}, delimiters=self.settings.delimiters,
                end_token_ids=self.settings.end_token_ids, takes_hints=self.settings.hint,
            )
            for url, more in ((self.settings.target, own), (self.settings.draft, {}))
        )  # fmt: skip
        return target, draft

    def _limits(self, body: Mapping[str, Any]) -> Limits:
        wanted = body.get("max_completion_tokens") or body.get("max_tokens") or self.settings.max_tokens
        if type(wanted) is not int or wanted < 1:
            raise _Refused("max_tokens is no positive integer")
        return Limits(min(wanted, self.settings.max_tokens), self.settings.step_tokens)


class _Answer:
    """One request on its way."""

    def __init__(
        self, proxy: Proxy, body: Mapping[str, Any], is_chat: bool, prompt: list[int], limits: Limits,
        target: TokenEndpoint, draft: TokenEndpoint,
    ):  # fmt: skip
        self.proxy, self.body, self.is_chat, self.prompt, self.limits = proxy, body, is_chat, prompt, limits
        self.target, self.draft = target, draft
        self.id = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.text = GrowingText(proxy.tokenizer)
        self.num_tokens = self.num_steps = self.num_drafts = 0
        self.reason: str | None = None

    async def parts(self) -> AsyncGenerator[str, None]:
        """Yield text as steps become final; whatever ends it, nothing goes on in the engines."""
        proxy = self.proxy
        if proxy.active >= proxy.settings.max_requests:
            raise LookaheadError("as many requests are running as there may be")
        proxy.active += 1
        text: Text = proxy.switch.begin()
        started, whole = time.monotonic(), False
        assert proxy.verifier is not None
        verifier = for_sampling(proxy.verifier, self.target.sampling)
        core = Lookahead(
            self.target, self.draft, verifier, self.limits, text.depth,
            width=proxy.settings.width, hint=proxy.settings.hint, counts=text.counts,
        )  # fmt: skip
        try:
            async with aclosing(core.steps(self.prompt)) as steps:
                async for final in steps:
                    self._count(final)
                    yield self.text.add(final.step.token_ids, last=self.reason is not None)
            whole = True
        except (asyncio.CancelledError, GeneratorExit):
            proxy.counts["cancelled"] += 1
            raise
        except Exception:
            proxy.counts["failed"] += 1
            raise
        finally:
            proxy.active -= 1
            text.end(self.num_tokens if whole else 0, time.monotonic() - started)
            proxy.counts.update(
                steps=self.num_steps, draft_steps=self.num_drafts, tokens=self.num_tokens,
                target_steps=text.counts.target_steps, drafts_lost=text.counts.drafts_lost,
            )  # fmt: skip

    def _count(self, final: FinalStep) -> None:
        self.num_tokens += len(final.step.token_ids)
        self.num_steps += 1
        self.num_drafts += final.from_draft
        if final.step.end:
            self.reason = "stop"
        elif self.num_tokens >= self.limits.max_tokens:
            self.reason = "length"

    async def whole(self, request: Request) -> Response:
        collected: list[str] = []

        async def collect() -> None:
            async with aclosing(self.parts()) as parts:
                async for part in parts:
                    collected.append(part)

        work = asyncio.create_task(collect())
        gone = asyncio.create_task(_until_gone(request))
        try:
            await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return Response(status_code=499)  # nobody reads it
            work.result()
        except LookaheadError as error:
            return _error(_status(error), f"the target failed: {error}")
        except (aiohttp.ClientError, OSError) as error:
            return _error(502, f"the target cannot be reached: {type(error).__name__}")
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        text = "".join(collected)
        content = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        kind = "chat.completion" if self.is_chat else "text_completion"
        return JSONResponse(self._envelope(kind, content) | {"usage": self._usage()})

    async def stream(self) -> AsyncIterator[str]:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        try:
            async with aclosing(self.parts()) as parts:
                async for part in parts:
                    content = {"delta": {"role": "assistant", "content": part}} if self.is_chat else {"text": part}
                    yield _event(self._envelope(kind, content))
        except LookaheadError as error:
            yield _event({"error": {"message": f"the target failed: {error}", "code": _status(error)}})
            return
        except (aiohttp.ClientError, OSError) as error:
            yield _event({"error": {"message": f"the target cannot be reached: {type(error).__name__}", "code": 502}})
            return
        if (self.body.get("stream_options") or {}).get("include_usage"):
            yield _event(self._envelope(kind, None) | {"choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _envelope(self, kind: str, content: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.proxy.settings.model,
            "choices": [{"index": 0, **(content or {}), "finish_reason": self.reason, "logprobs": None}],
        }  # fmt: skip

    def _usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": len(self.prompt), "completion_tokens": self.num_tokens,
            "total_tokens": len(self.prompt) + self.num_tokens,
            "lookahead": {"steps": self.num_steps, "from_draft": self.num_drafts},
        }  # fmt: skip


async def _until_gone(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)


def _cost_lines(cost: Cost | None) -> list[str]:
    """Return what `/metrics` shows of a verifier that asks a model, nothing of another."""
    lines = []
    for name, help_ in VERIFIER_COUNTERS.items() if cost is not None else ():
        full = f"rl_accel_lookahead_verifier_{name}_total"
        lines += [f"# HELP {full} {help_}", f"# TYPE {full} counter", f"{full} {getattr(cost, name)}"]
    return lines


def _status(error: LookaheadError) -> int:
    return 400 if isinstance(error, EngineRefusesError) else 502


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error", "code": status}}, status)


def _event(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
