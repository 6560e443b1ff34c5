"""A vLLM server with exact sampling and DAS under load, in a process of its own: `python soak.py FACTOR OUT.json`.

The engine core runs in a child process as it does behind `vllm serve`; requests come over HTTP, some streamed, and
directly, as verl sends them. First every kind of request is sampled calmly, four at a time and without drafts; then
64 at a time from the same kinds, between them aborts, closed connections and requests that carry rubbish.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import os
import random
import sys
import time
from pathlib import Path

import aiohttp
import psutil

CALM_AT_ONCE, AT_ONCE, NUM_REQUESTS, ROUNDS = 4, 64, 160, 4
GONE = ("abort", "close")
IDENTITY = {"problem_id": "p", "sample_index": 0, "step": 1, "validate": False}
PROMPTS = [
    "Question: Tom has 3 apples and buys 4 more. How many apples does he have?\nAnswer:",
    "Q",
    "A shop sells pens at 2 dollars each. Ann buys 7 pens. How much does she pay? " * 3,
    "The farmer has 12 cows and 5 pigs. " * 12,
]
WARM = {"temperature": 0.7, "max_tokens": 40}
KINDS = {
    "greedy": {"temperature": 0.0, "max_tokens": 60},
    "greedy_penalties": {"temperature": 0.0, "max_tokens": 40, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    "warm": {**WARM, "temperature": 1.0},
    "cold": {"temperature": 0.2, "max_tokens": 90},
    "nucleus": {**WARM, "top_p": 0.9},
    "top_k": {**WARM, "top_k": 12, "top_p": 0.95},
    "penalties": {**WARM, "presence_penalty": 0.5, "frequency_penalty": 0.4},
    "three": {**WARM, "n": 3, "max_tokens": 25},
    "logprobs": {**WARM, "logprobs": 3, "max_tokens": 25},
    "stop_string": {**WARM, "temperature": 0.3, "stop": ["."]},
    "stop_token": {**WARM, "stop_token_ids": [14, 15, 16, 17], "min_tokens": 9},
    "allowed": {**WARM, "allowed_token_ids": list(range(60, 110))},
    "allowed_greedy": {"temperature": 0.0, "allowed_token_ids": list(range(20, 200, 3)), "max_tokens": 20},
    "bad_words": {**WARM, "temperature": 0.3, "bad_words": ["the", "has", "4"]},
    "min_tokens": {**WARM, "min_tokens": 30},
    "short": {**WARM, "max_tokens": 1},
    "long": {"temperature": 0.4, "max_tokens": 200, "ignore_eos": True},
    "grammar": {**WARM, "structured_outputs": {"regex": "[0-9]{3,20} (apples|cows)"}},
}
"""Parameters that both the completions protocol and `SamplingParams` know."""
for number, fields in enumerate(KINDS.values()):
    if fields["temperature"]:
        fields["seed"] = number
RUBBISH_HTTP = ["x", "", "1" * (1 << 20), 7, -1, 2.5, [1, 2], ["p", 0, 1], "\u00fc\U0001f600"]
RUBBISH = [
    *RUBBISH_HTTP,
    *([IDENTITY], {}, [[]], True, {"problem_id": "p"}, {"a": {"b": [{}]}}),
    *({**IDENTITY, "step": value} for value in ("1", None, 1.5, (1 << 64) - 1)),
    *({**IDENTITY, "problem_id": value} for value in (None, ["p"], False)),
    *({**IDENTITY, "call": value} for value in (True, "0", None)),
    {**IDENTITY, "validate": 2},
]
UNSENDABLE = [{**IDENTITY, "step": 1 << 80}, {**IDENTITY, "problem_id": "\udc80"}]
"""What does not survive the way to the engine core: an error of that request."""


class Soak:
    """Sends requests to one engine and keeps what came of them."""

    def __init__(self, engine, url: str, session: aiohttp.ClientSession):
        self.engine, self.url, self.session = engine, url, session
        self.lost: list[str] = []
        self.refused: list[str] = []
        self.finished = self.gone = 0

    async def send(self, kind: str, prompt: int, way: str, rubbish=None, gone: str = "", wait: float = 0.0):
        """Return [text, tokens, reason] of every choice, None if it was given up or refused."""
        try:
            if way == "direct":
                choices = await self._direct(kind, prompt, rubbish, gone, wait)
            else:
                choices = await self._http(kind, prompt, way == "stream", rubbish, gone, wait)
        except (asyncio.CancelledError, TimeoutError):
            self.gone += 1
            return None
        if choices is None:
            return None
        if not all(reason in ("stop", "length") for *_, reason in choices) or len(choices) != KINDS[kind].get("n", 1):
            self.lost.append(f"{kind} {prompt} {way} {gone}: {[reason for *_, reason in choices]}")
        self.finished += 1
        return choices

    async def _direct(self, kind, prompt, rubbish, gone, wait):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        fields = dict(KINDS[kind])
        if grammar := fields.pop("structured_outputs", None):
            fields["structured_outputs"] = StructuredOutputsParams(**grammar)
        if rubbish is None:
            # An identity makes a request reproducible as a seed does; its samples are those of this identity.
            step = sorted(KINDS).index(kind)
            fields["extra_args"] = {"rl_accel": {**IDENTITY, "problem_id": f"p{prompt}", "step": step}}
        else:
            fields["extra_args"] = {"rl_accel": rubbish}
        params = SamplingParams(output_kind=RequestOutputKind.CUMULATIVE, **fields)
        name = f"r{random.getrandbits(60)}"
        final = {}

        async def generate():
            async for output in self.engine.generate(PROMPTS[prompt], params, name):
                final.update({choice.index: choice for choice in output.outputs})

        if gone == "close":
            await asyncio.wait_for(generate(), wait)
        elif gone == "abort":
            task = asyncio.create_task(generate())
            await asyncio.sleep(wait)
            await self.engine.abort(name)
            await asyncio.wait_for(task, 60)
            if any(choice.finish_reason == "abort" for choice in final.values()) or not final:
                self.gone += 1
                return None
        else:
            await generate()
        return [[c.text, list(c.token_ids), c.finish_reason] for _, c in sorted(final.items())]

    async def _http(self, kind, prompt, stream, rubbish, gone, wait):
        body = {"model": "m", "prompt": PROMPTS[prompt], "return_token_ids": True, "stream": stream, **KINDS[kind]}
        if rubbish is not None:
            body["vllm_xargs"] = {"rl_accel": rubbish}
        timeout = aiohttp.ClientTimeout(total=wait if gone else 300)
        async with self.session.post(f"{self.url}/v1/completions", json=body, timeout=timeout) as answer:
            if answer.status == 400:
                self.refused.append(kind if rubbish is None else "malformed identity")
                return None
            if answer.status != 200:
                self.lost.append(f"{kind} over HTTP: {answer.status} {(await answer.text())[:200]}")
                return None
            if not stream:
                parts = [(await answer.json())["choices"]]
            else:
                lines = [line.decode().strip() async for line in answer.content]
                parts = [json.loads(line[6:])["choices"] for line in lines if line.startswith("data: {")]
        choices = [["", [], None] for _ in range(KINDS[kind].get("n", 1))]
        for part in parts:
            for choice in part:
                whole = choices[choice["index"]]
                whole[0] += choice["text"]
                whole[1] += choice["token_ids"] or []
                whole[2] = choice["finish_reason"] or whole[2]
        return choices

    async def refuse(self, what) -> str:
        """Send what must fail alone; returns the kind of error."""
        try:
            await asyncio.wait_for(what, 60)
        except Exception as error:
            return type(error).__name__
        return "served"


def comparable(kind: str, choice: list) -> list:
    """A stop string cuts the text, and the tokens only at the end of the step that completes it."""
    text, tokens, reason = choice
    return [text, None if kind == "stop_string" else tokens, reason]


async def soak(engine, url: str, factor: float) -> dict:
    """Return what the test asserts on."""
    chance = random.Random(0)
    names = [(kind, prompt) for kind in KINDS for prompt in range(len(PROMPTS))]
    result: dict = {"memory": []}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:
        load = Soak(engine, url, session)
        await until_it_answers(session, url)

        async def all_of(calls, at_once):
            gate = asyncio.Semaphore(at_once)

            async def one(call):
                async with gate:
                    return await call

            return await asyncio.gather(*map(one, calls))

        await engine.collective_rpc(set_drafting, args=(False,))
        calm: dict = {}
        chosen = [(kind, i % len(PROMPTS)) for i, kind in enumerate(KINDS)] if factor <= 1 else names
        wanted = [(*name, way) for name in chosen for way in ("direct", "http")]
        for name, choices in zip(wanted, await all_of((load.send(*w) for w in wanted), CALM_AT_ONCE), strict=True):
            calm[name] = [comparable(name[0], choice) for choice in choices]
        await engine.collective_rpc(set_drafting, args=(True,))
        result["memory"].append(await measure(engine))

        different, compared, started = [], 0, time.monotonic()
        for _ in range(ROUNDS):
            plan = []
            for _ in range(int(NUM_REQUESTS * factor / ROUNDS)):
                kind, prompt = chance.choice(chosen)
                way = chance.choice(("direct", "http", "stream"))
                rubbish = (
                    chance.choice(RUBBISH if way == "direct" else RUBBISH_HTTP) if chance.random() < 0.15 else None
                )
                gone = chance.choice(GONE) if chance.random() < 0.15 else ""
                plan.append((kind, prompt, way, rubbish, gone, chance.expovariate(4.0) + 0.02 if gone else 0.0))
            answers = await all_of((load.send(*call) for call in plan), AT_ONCE)
            for (kind, prompt, way, rubbish, *_), choices in zip(plan, answers, strict=True):
                if choices is None or (
                    rubbish is not None and "seed" not in KINDS[kind] and KINDS[kind]["temperature"]
                ):
                    continue
                # A request with rubbish is one without identity, as every request over HTTP is.
                want = calm[kind, prompt, "direct" if way == "direct" and rubbish is None else "http"]
                compared += 1
                if [comparable(kind, choice) for choice in choices] != want:
                    different.append([kind, prompt, way, repr(rubbish)[:40], choices, want])
            result["memory"].append(await measure(engine))
        result |= {"seconds": time.monotonic() - started, "different": different, "compared": compared}
        await asyncio.sleep(0.5)
        result["front_end"] = len(engine.output_processor.request_states)
        result["unsendable"] = [await load.refuse(load.send("warm", 0, "direct", rubbish)) for rubbish in UNSENDABLE]
        result["pooling"] = await load.refuse(pool(engine))
        result["embedded"] = await embedded(engine)
        result["nested_xargs"] = await status_of(session, url, {"rl_accel": IDENTITY})
        result["empty_prompt"] = await status_of(session, url, {}, prompt="")
        result["last"] = [comparable("greedy", c) for c in await load.send("greedy", 0, "http")] == calm.get(
            ("greedy", 0, "http")
        )
        result |= {"lost": load.lost, "finished": load.finished, "gone": load.gone, "refused": load.refused}
        result["state"] = (await engine.collective_rpc(state))[0]
        await engine.check_health()
    return result


async def until_it_answers(session, url: str) -> None:
    for _ in range(600):
        try:
            async with session.get(f"{url}/health"):
                return
        except aiohttp.ClientError:
            await asyncio.sleep(0.1)


async def pool(engine) -> None:
    from vllm import PoolingParams

    async for _ in engine.encode(PROMPTS[0], PoolingParams(task="embed"), "pooling"):
        pass


async def embedded(engine) -> list[str]:
    """Finish reasons of prompts that are embeddings; their random numbers need no prompt tokens."""
    import torch
    from vllm import SamplingParams

    reasons = []
    for i in range(2):
        params = SamplingParams(temperature=0.8, seed=i, max_tokens=12, ignore_eos=True)
        async for output in engine.generate({"prompt_embeds": torch.randn(9, 128)}, params, f"embedded{i}"):
            reasons += [output.outputs[0].finish_reason] if output.finished else []
    return reasons


async def status_of(session, url: str, xargs: dict, prompt: str = "Q") -> int:
    body = {"model": "m", "prompt": prompt, "max_tokens": 2, "vllm_xargs": xargs}
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        return answer.status


async def measure(engine) -> dict:
    """Bytes of the engine core's process and of its drafter, which may grow with what it learns."""
    processes = psutil.Process().children(recursive=True)
    memory = {"rss": sum(p.memory_info().rss for p in processes if p.memory_info().rss > 300 << 20)}
    return memory | (await engine.collective_rpc(drafter_memory))[0] | {"own": psutil.Process().memory_info().rss}


def set_drafting(worker, on: bool) -> None:
    proposer = worker.model_runner.drafter
    if on:
        proposer.drafter = proposer.parked
    else:
        proposer.parked, proposer.drafter = proposer.drafter, None


def drafter_memory(worker) -> dict:
    gc.collect()
    proposer = worker.model_runner.drafter
    drafter = proposer.drafter or proposer.parked
    learned = sum(segment["num_tokens"] for segment in drafter.index.segments())
    return {
        "drafter": sum(drafter.index.memory_bytes().values()),
        "learned": learned,
        "live": drafter.index.live_tokens(),
    }


def state(worker) -> dict:
    """What the engine core still holds when all are gone."""
    from vllm.v1.core.sched.scheduler import Scheduler

    runner = worker.model_runner
    proposer = runner.drafter
    gc.unfreeze()  # vLLM hides its start-up objects from the collector
    scheduler = next(o for o in gc.get_objects() if isinstance(o, Scheduler))
    proposer._end_gone()  # as the next call will
    proposer.drafter.index.check_integrity()
    return {
        "requests": len(runner.requests),
        "rows": len(runner.input_batch.req_id_to_index),
        "prompt_logprobs": len(runner.num_prompt_logprobs),
        "masks": len(runner.input_batch.has_allowed_token_ids),
        "drafted": len(proposer._keep_in_history),
        "anonymous": len(proposer._anonymous),
        "undrafted": len(proposer._undrafted),
        "slots": len(proposer.drafter),
        "scheduled": len(scheduler.requests),
        "blocks_in_use": scheduler.kv_cache_manager.usage,
        "faults": dict(runner.rl_accel_faults.counts),
        "counts": runner.rl_accel_spec_stats.drain(),
        "live": runner.rl_accel_live,
    }


async def serve(factor: float) -> dict:
    """Start the server in this process and run the soak against it."""
    from vllm.entrypoints.openai.api_server import build_and_serve, build_async_engine_client, setup_server
    from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    import rl_accel
    from rl_accel.config import AccelConfig
    from rl_accel.hosts.verl.prepare import engine_args, engine_settings

    accel = AccelConfig.from_mapping({"draft": {"method": "das", "num_speculative_tokens": 8}})
    settings = {"sampling": {"exact": True, "seed": 7}, **engine_settings(accel)}
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(
        [
            "--model", str(Path(rl_accel.__file__).parent / "quickstart" / "policy"), "--served-model-name", "m",
            "--dtype", "float32", "--enforce-eager", "--max-model-len", "640", "--max-num-seqs", str(AT_ONCE),
            "--max-num-batched-tokens", "512", "--block-size", "16", "--num-gpu-blocks-override", "700",
            "--distributed-executor-backend", "uni", "--enable-prompt-embeds", "--disable-uvicorn-access-log",
            "--uvicorn-log-level", "warning", "--host", "127.0.0.1", "--port", "0", "--generation-config", "vllm",
            "--speculative-config", json.dumps(engine_args(accel)["speculative_config"][0]),
            "--additional-config", json.dumps({"rl_accel": settings}),
        ]
    )  # fmt: skip
    validate_parsed_serve_args(args)
    alone = {"reuse_port": False} if "reuse_port" in inspect.signature(setup_server).parameters else {}
    address, sock = setup_server(args, **alone)
    async with build_async_engine_client(args) as engine:
        server = asyncio.create_task(build_and_serve(engine, address, sock, args))
        try:
            return await soak(engine, f"http://127.0.0.1:{sock.getsockname()[1]}", factor)
        finally:
            server.cancel()
            await asyncio.wait([server])


if __name__ == "__main__":
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else the CPU platform gives the worker a process of its own
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    Path(sys.argv[2]).write_text(json.dumps(asyncio.run(serve(float(sys.argv[1])))))
