"""How a text is written by lookahead and by what it is compared with: servers of the bed, and arms over them.

Engines are `vllm serve` processes with exact sampling, one a name `role:method`, such as `target:das`, `draft:none`,
`target:model=16`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from make_lookahead_bed import Bed

from rl_accel.config import AccelConfig
from rl_accel.identity import FIELD
from rl_accel.lookahead.core import Counts, Limits, Lookahead
from rl_accel.lookahead.endpoint import TokenEndpoint
from rl_accel.lookahead.server import Server
from rl_accel.lookahead.step import Verifier
from rl_accel.lookahead.switch import Switch
from rl_accel.lookahead.verifiers import for_sampling
from rl_accel.lookahead.verify import Exact

SEED = 11
MAX_TOKENS, MAX_MODEL_LEN = 320, 656
START_S = REQUEST_S = 300.0
THREADS = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@dataclass
class Problem:
    problem_id: str
    prompt_token_ids: list[int]


@dataclass
class Written:
    """A text and what it took."""

    token_ids: list[int]
    seconds: float
    counts: Counts = field(default_factory=Counts)
    step_lengths: list[int] = field(default_factory=list)
    agreed: list[bool] = field(default_factory=list)


class Engines:
    """Servers by name, started when first asked for."""

    def __init__(self, bed: Bed, folder: Path, max_draft: int, draft_length: int, threads: dict[str, str]):
        self.bed, self.folder, self.max_draft, self.draft_length = bed, folder, max_draft, draft_length
        self.threads = threads
        self.servers: dict[str, Server] = {}

    def start(self, names: Sequence[str]) -> None:
        """One after the other: a machine of few cores starts several at once more slowly."""
        for name in names:
            if name not in self.servers:
                started = time.monotonic()
                self.servers[name] = self._server(name)
                self.servers[name].wait(START_S)
                print(f"{name} is up after {time.monotonic() - started:.0f} s", flush=True)

    def url(self, name: str) -> str:
        return self.servers[name].url

    def stop(self) -> None:
        for server in self.servers.values():
            server.stop()

    def draft_length_of(self, name: str) -> int:
        """Return the longest token draft of an engine that drafts."""
        method, _, length = name.partition(":")[2].partition("=")
        return int(length or (self.draft_length if method in ("model", "hinted") else self.max_draft))

    def _server(self, name: str) -> Server:
        from rl_accel.hosts.verl.prepare import engine_args, engine_settings

        role, _, method = name.partition("=")[0].partition(":")
        hinted = method == "hinted"
        method = "model" if hinted else method
        draft: dict[str, Any] = {"method": method}
        if method in ("model", "ahead"):
            draft |= {"model": str(self.bed.draft), "num_speculative_tokens": self.draft_length_of(name)}
        elif method == "das":
            draft["num_speculative_tokens"] = self.draft_length_of(name)
        accel = AccelConfig.from_mapping({"sampling": {"exact": True, "seed": SEED}, "draft": draft})
        args = ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(MAX_MODEL_LEN), "--block-size", "32"]
        args += ["--max-num-seqs", "64", "--generation-config", "vllm", "--max-num-batched-tokens", "4096"]
        args += ["--additional-config", json.dumps({"rl_accel": engine_settings(accel)})]
        for option, (value, _) in engine_args(accel).items():
            args += [f"--{option.replace('_', '-')}", json.dumps(value)]
        args += ["--no-async-scheduling"] if hinted else []  # it leaves no time to look at a hint
        env = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        env |= {"VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_LOGGING_LEVEL": "WARNING", **self.threads}
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = (
            "0"  # the worker in the process of its engine: they poll each other otherwise
        )
        model = self.bed.target if role == "target" else self.bed.draft
        return Server(str(model), args, self.folder / f"{name.replace(':', '-')}.log", env=env)


@dataclass(frozen=True)
class Arm:
    """How texts are written."""

    name: str
    target: str
    draft: str | None = None
    hint: bool = False
    depth: int = 8
    width: int = 1

    @classmethod
    def named(cls, name: str, depth: int = 8) -> Arm:
        what, _, inside = name.partition("@")
        hint = "+hint" in what
        what = what.replace("+hint", "")
        if not what.startswith("look"):
            return cls(name, "target:" + ("none" if what == "plain" else what))
        over = what.partition("+")[2] or ("das" if hint else "none")
        target = "target:hinted" if hint and over == "model" else f"target:{over}"
        return cls(name, target, f"draft:{inside or 'none'}", hint=hint, depth=depth)

    @property
    def engines(self) -> list[str]:
        return [self.target] + ([self.draft] if self.draft else [])


class Writer:
    """Writes texts by an arm."""

    def __init__(self, engines: Engines, session: aiohttp.ClientSession, delimiters: Sequence[int], end: int):
        self.engines, self.session, self.delimiters, self.end = engines, session, delimiters, end
        self.switches: dict[str, Switch] = {}
        self.verifier: Verifier = Exact()

    def endpoint(self, name: str, problem: Problem, temperature: float, whole: bool, hint: bool) -> TokenEndpoint:
        identity = {"problem_id": problem.problem_id, "sample_index": 0, "step": 0, "validate": True}
        sampling: dict[str, Any] = {"temperature": temperature, "top_p": 1.0, "extra_args": {FIELD: identity}}
        if getattr(self.verifier, "needs_logprobs", False) and name.startswith("target"):
            sampling["logprobs"] = 0
        return TokenEndpoint(
            self.session, self.engines.url(name), sampling, delimiters=() if whole else self.delimiters,
            end_token_ids=(self.end,), takes_hints=hint,
        )  # fmt: skip

    async def write(self, arm: Arm, problem: Problem, temperature: float, switch: Switch | None = None) -> Written:
        """Write one text; with `switch`, as that decides."""
        started = time.perf_counter()
        text = switch.begin() if switch is not None else None
        if arm.draft is None or (text is not None and not text.drafts):
            engine = self.endpoint(arm.target, problem, temperature, True, False)
            step = await engine.step(problem.prompt_token_ids, MAX_TOKENS)
            written = Written(list(step.token_ids), time.perf_counter() - started)
        else:
            written = await self._write_ahead(arm, problem, temperature, text)
        if text is not None:
            text.end(len(written.token_ids), written.seconds)
        return written

    async def _write_ahead(self, arm: Arm, problem: Problem, temperature: float, text: Any) -> Written:
        assert arm.draft is not None
        started = time.perf_counter()
        always = text is None
        if always:
            text = self.switches.setdefault(arm.name, Switch(arm.depth, always=True)).begin()
        target = self.endpoint(arm.target, problem, temperature, False, arm.hint)
        draft = self.endpoint(arm.draft, problem, temperature, False, False)
        written = Written([], 0.0, text.counts)
        verifier = for_sampling(self.verifier, target.sampling)
        core = Lookahead(
            target, draft, verifier, Limits(MAX_TOKENS), text.depth, width=arm.width, hint=arm.hint, counts=text.counts
        )
        async with aclosing(core.steps(problem.prompt_token_ids)) as steps:
            async for final in steps:
                written.token_ids += final.step.token_ids
                written.step_lengths.append(len(final.step.token_ids))
                written.agreed.append(final.from_draft)
        assert not text.counts.drafts_lost, text.counts.draft_error
        written.seconds = time.perf_counter() - started
        if always:
            text.end(0, 0.0)
        return written

    async def block(
        self, arm: Arm, problems: Sequence[Problem], temperature: float, at_a_time: int, switch: Switch | None = None
    ) -> tuple[float, list[Written]]:
        """Return seconds of all and the texts, in the order of the problems."""
        gate = asyncio.Semaphore(at_a_time)

        async def one(problem: Problem) -> Written:
            async with gate:
                return await self.write(arm, problem, temperature, switch)

        started = time.perf_counter()
        texts = await asyncio.gather(*map(one, problems))
        return time.perf_counter() - started, texts


def read_problems(path: Path) -> list[Problem]:
    rows = map(json.loads, path.read_text().splitlines())
    return [Problem(row["problem_id"], row["prompt_token_ids"]) for row in rows]
