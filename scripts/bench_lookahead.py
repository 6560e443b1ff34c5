"""What lookahead brings over plain decoding and over token speculation: python scripts/bench_lookahead.py [options].

Engines are `vllm serve` processes with exact sampling, which are all up and of which only an arm's own have work. Every
arm writes the same texts, blocks of them in a rotating order, and has to write the same tokens. The bed is that of
`make_lookahead_bed.py`, made on first use.

Arms: `plain`; `ahead`: the draft goes on writing in a process beside the target's engine, which verifies what is there
(`draft.method=ahead`); `das`, `ngram`, `suffix`, `model`: the target alone with these token drafts; `look`, `look+das`,
`look+model`: lookahead over such a target; `look+hint`: over `das`, which is also given the draft's steps; and each of
the latter with `@das`: the draft's own engine drafts tokens, too.

Rows: `lookahead.speedup` (seconds of plain / best lookahead arm), `.over_token` (best token arm / best lookahead arm),
`.simulator_error` (predicted by the core on the virtual clock from measured steps / measured - 1, the worst arm),
`.identical` (share of texts with the same tokens over temperatures, depths, widths, hints and texts at a time), and
`.switched_worst` (seconds of the switch / plain, worst of 1 to 32 texts at a time).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from make_lookahead_bed import Bed, BedSettings, make_bed

from rl_accel.config import AccelConfig
from rl_accel.identity import FIELD
from rl_accel.lookahead import clock, formulas
from rl_accel.lookahead.core import Counts, Limits, Lookahead
from rl_accel.lookahead.endpoint import TokenEndpoint
from rl_accel.lookahead.server import Server
from rl_accel.lookahead.simulate import Script, ScriptedEngine
from rl_accel.lookahead.step import Verifier
from rl_accel.lookahead.switch import Switch
from rl_accel.lookahead.text import delimiter_ids
from rl_accel.lookahead.verifiers import for_sampling
from rl_accel.lookahead.verify import Exact

SEED = 11
MAX_TOKENS, MAX_MODEL_LEN = 320, 656
START_S = 300.0
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

    def _server(self, name: str) -> Server:
        from rl_accel.hosts.verl.prepare import engine_args, engine_settings

        role, method = name.split(":")
        hinted = method == "hinted"
        method = "model" if hinted else method
        draft: dict[str, Any] = {"method": method}
        if method == "model":
            draft |= {"model": str(self.bed.draft), "num_speculative_tokens": self.draft_length}
        elif method == "ahead":
            draft |= {"model": str(self.bed.draft), "num_speculative_tokens": self.max_draft}
        elif method == "das":
            draft["num_speculative_tokens"] = self.max_draft
        accel = AccelConfig.from_mapping({"sampling": {"exact": True, "seed": SEED}, "draft": draft})
        args = ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(MAX_MODEL_LEN), "--block-size", "32"]
        args += ["--max-num-seqs", "64", "--generation-config", "vllm", "--max-num-batched-tokens", "4096"]
        args += ["--additional-config", json.dumps({"rl_accel": engine_settings(accel)})]
        for option, (value, _) in engine_args(accel).items():
            args += [f"--{option.replace('_', '-')}", json.dumps(value)]
        args += ["--no-async-scheduling"] if hinted else []  # it leaves no time to look at a hint
        env = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        env |= {"VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_LOGGING_LEVEL": "WARNING", **self.threads}
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
        if text is None:
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


async def speed(
    writer: Writer, arms: Sequence[Arm], problems: Sequence[Problem], temperature: float, blocks: int, texts: int,
    at_a_time: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Time the arms on blocks of the same texts; the first block warms up."""
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    ahead: dict[str, list[Written]] = {arm.name: [] for arm in arms}
    num_tokens = 0
    for block in range(blocks + 1):
        chosen = problems[block * texts : (block + 1) * texts]
        assert len(chosen) == texts, "too few problems"
        wanted: list[list[int]] | None = None
        turn = block % len(arms)
        for arm in [*arms[turn:], *arms[:turn]]:
            took, written = await writer.block(arm, chosen, temperature, at_a_time)
            said = [text.token_ids for text in written]
            assert wanted is None or said == wanted, f"{arm.name} writes other tokens"
            wanted = said
            if block:
                seconds[arm.name].append(took)
                ahead[arm.name] += written
        num_tokens += sum(map(len, wanted or [])) if block else 0
        print(f"block {block}  " + "  ".join(f"{n} {s[-1]:.2f}" for n, s in seconds.items() if s), flush=True)
    rows: dict[str, Any] = {"tokens": num_tokens, "temperature": temperature, "at_a_time": at_a_time, "arms": {}}
    plain = seconds["plain"]
    for arm in arms:
        ratios = [one / other for one, other in zip(plain, seconds[arm.name], strict=True)]
        row: dict[str, Any] = {
            "ms_per_token": 1e3 * sum(seconds[arm.name]) / num_tokens,
            "speedup": statistics.median(ratios), "speedup_spread": [min(ratios), max(ratios)],
        }  # fmt: skip
        if arm.draft:
            begun = sum(text.counts.target_steps for text in ahead[arm.name])
            row["target_steps_a_step"] = begun / sum(len(text.agreed) for text in ahead[arm.name])
            row |= await simulated(writer, arm, problems[: 2 * texts], temperature)
            row["of_simulated"] = row["simulated_ms_per_token"] / row["ms_per_token"]
        rows["arms"][arm.name] = row
    return rows


@dataclass
class Alone:
    """The steps of a text, each written with nothing beside it: seconds, and whether the draft has the same."""

    target_s: list[float] = field(default_factory=list)
    draft_s: list[float] = field(default_factory=list)
    agrees: list[bool] = field(default_factory=list)
    num_tokens: int = 0


async def write_alone(writer: Writer, arm: Arm, problem: Problem, temperature: float) -> Alone:
    """Write a text step by step, first the draft's step and then the target's, which gets it as its hint if it may."""
    assert arm.draft is not None
    target = writer.endpoint(arm.target, problem, temperature, False, arm.hint)
    draft = writer.endpoint(arm.draft, problem, temperature, False, False)
    prefix, found = tuple(problem.prompt_token_ids), Alone()
    while found.num_tokens < MAX_TOKENS:
        left = MAX_TOKENS - found.num_tokens
        times = [time.perf_counter()]
        ahead = await draft.step(prefix, left)
        times.append(time.perf_counter())
        step = await target.step(prefix, left, hint=ahead.token_ids)
        times.append(time.perf_counter())
        found.draft_s.append(times[1] - times[0])
        found.target_s.append(times[2] - times[1])
        found.agrees.append(ahead.token_ids == step.token_ids and step.whole)
        found.num_tokens += len(step.token_ids)
        prefix += step.token_ids
        if step.end:
            break
    return found


async def simulated(writer: Writer, arm: Arm, problems: Sequence[Problem], temperature: float) -> dict[str, Any]:
    """Return what the core makes of these steps on the virtual clock, where engines do not disturb each other."""
    texts = [await write_alone(writer, arm, problem, temperature) for problem in problems]
    target = [s for text in texts for s in text.target_s]
    draft = [s for text in texts for s in text.draft_s]
    ratio = statistics.median(draft) / statistics.median(target)
    depth = min(arm.depth, max(2, formulas.full_depth(ratio)))
    seconds = await asyncio.to_thread(lambda: sum(_on_virtual_clock(text, arm.hint, depth) for text in texts))
    agrees = [flag for text in texts for flag in text.agrees]
    return {
        "simulated_ms_per_token": 1e3 * seconds / sum(text.num_tokens for text in texts),
        "agreement": statistics.fmean(agrees), "steps": len(agrees) / len(texts), "depth": depth,
        "step_tokens": sum(text.num_tokens for text in texts) / len(agrees),
        "target_step_ms": 1e3 * statistics.fmean(target), "draft_step_ms": 1e3 * statistics.fmean(draft),
        "step_ratio": ratio,
    }  # fmt: skip


def _on_virtual_clock(text: Alone, hint: bool, depth: int) -> float:
    target = ScriptedEngine(Script(text.target_s, text.agrees))
    draft = ScriptedEngine(Script(text.draft_s, text.agrees), is_draft=True)

    async def decode() -> None:
        limits = Limits(max_tokens=len(text.agrees), step_tokens=1)
        async for _ in Lookahead(target, draft, Exact(), limits, lambda: depth, hint=hint).steps(()):
            pass

    return clock.run(decode())[1]


async def identity(writer: Writer, engines: Engines, problems: Sequence[Problem]) -> dict[str, Any]:
    """Compare tokens with those of plain decoding over temperatures, depths, widths, hints and texts at a time."""
    variants = [
        ("look", {"depth": 2}, 1), ("look", {"depth": 8}, 16), ("look", {"depth": 4, "width": 2}, 8),
        ("look+hint", {"depth": 8}, 16), ("look+hint", {"depth": 3, "width": 2}, 4), ("look+model", {"depth": 8}, 32),
    ]  # fmt: skip
    arms = [(Arm.named(name), options, n) for name, options, n in variants]
    engines.start(["target:none", *dict.fromkeys(e for arm, _, _ in arms for e in arm.engines)])
    rows, same, total = [], 0, 0
    for temperature in (0.0, 0.6, 1.0):
        _, plain = await writer.block(Arm.named("plain"), problems, temperature, 32)
        for number, (arm, options, at_a_time) in enumerate(arms):
            # The usual way all problems, the other variants their share.
            whole = (arm.name, options, at_a_time) == ("look+hint", {"depth": 8}, 16)
            chosen = range(len(problems)) if whole else range(number, len(problems), len(arms))
            varied = Arm(arm.name, arm.target, arm.draft, arm.hint, **options)
            writer.switches.pop(arm.name, None)
            _, written = await writer.block(varied, [problems[i] for i in chosen], temperature, at_a_time)
            equal = sum(text.token_ids == plain[i].token_ids for i, text in zip(chosen, written, strict=True))
            agreed = [flag for text in written for flag in text.agreed]
            row = {"temperature": temperature, "arm": arm.name, **options, "at_a_time": at_a_time}
            rows.append(row | {"texts": len(written), "identical": equal, "agreement": statistics.fmean(agreed)})
            print(rows[-1], flush=True)
            same, total = same + equal, total + len(written)
    return {"variants": rows, "texts": total, "identical": same / total}


async def crossover(
    writer: Writer, arm: Arm, problems: Sequence[Problem], temperature: float, blocks: int
) -> dict[str, Any]:
    """Compare the switch with plain decoding at 1 to 32 texts at a time; what it has learned stays, as in a server."""
    rows = []
    for at_a_time in (1, 4, 8, 16, 32):
        switch = Switch(arm.depth)
        texts = max(16, 2 * at_a_time)
        ratios = []
        for block in range(-4, blocks):  # the first ones let the switch learn
            chosen = [problems[(block * texts + i) % len(problems)] for i in range(texts)]
            order = (arm, Arm.named("plain")) if block % 2 else (Arm.named("plain"), arm)
            took = {}
            for one in order:
                took[one.name], _ = await writer.block(
                    one, chosen, temperature, at_a_time, switch if one is arm else None
                )
            if block >= 0:
                ratios.append(took[arm.name] / took["plain"])
        row = {"at_a_time": at_a_time, "over_plain": statistics.median(ratios)}
        rows.append(row | {"spread": [min(ratios), max(ratios)], "gains": switch.gains()})
        print(rows[-1], flush=True)
    return {"rows": rows, "worst": max(row["over_plain"] for row in rows)}


async def main_async(args: argparse.Namespace, bed: Bed, folder: Path, found: dict[str, Any]) -> None:
    """Fill `found` part by part; what was measured before a failure stays."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bed.target)
    engines = Engines(bed, folder, args.max_draft, args.draft_length, THREADS if args.threads == 1 else {})
    arms = [Arm.named(name, args.depth) for name in args.arms.split(",")]
    try:
        async with aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=300), connector=aiohttp.TCPConnector(limit=0)
        ) as session:
            writer = Writer(engines, session, delimiter_ids(tokenizer, "\n"), tokenizer.eos_token_id)
            if "speed" in args.what:
                engines.start(list(dict.fromkeys(engine for arm in arms for engine in arm.engines)))
                found["speed"] = {}
                for name in args.problems.split(","):
                    problems = read_problems(bed.problems(name))
                    for temperature in map(float, args.temperatures.split(",")):
                        found["speed"][f"{name} T={temperature:g}"] = await speed(
                            writer, arms, problems, temperature, args.blocks, args.texts, args.at_a_time
                        )
            if "identity" in args.what:
                problems = read_problems(bed.problems("mix"))[: args.identity]
                found["identity"] = await identity(writer, engines, problems)
            if "crossover" in args.what:
                arm = Arm.named(args.switched, args.depth)
                engines.start(["target:none", *arm.engines])
                problems = read_problems(bed.problems("long"))
                found["crossover"] = await crossover(writer, arm, problems, 1.0, args.blocks)
    finally:
        engines.stop()


def rows_of(found: dict[str, Any]) -> dict[str, float]:
    """Return the rows that the docstring names, of what was measured."""
    rows: dict[str, float] = {}
    for what, measured in found.get("speed", {}).items():
        arms = measured["arms"]
        ahead = {name: arm for name, arm in arms.items() if name == "ahead" or name.startswith("look")}
        token = [arm["ms_per_token"] for name, arm in arms.items() if name not in (*ahead, "plain")]
        if ahead:
            best = min(arm["ms_per_token"] for arm in ahead.values())
            rows[f"lookahead.speedup {what}"] = arms["plain"]["ms_per_token"] / best
            simulated = [arm["of_simulated"] for arm in ahead.values() if "of_simulated" in arm]
            if simulated:
                rows[f"lookahead.simulator_error {what}"] = min(simulated) - 1
            if token:
                rows[f"lookahead.over_token {what}"] = min(token) / best
    if "identity" in found:
        rows["lookahead.identical"] = found["identity"]["identical"]
    if "crossover" in found:
        rows["lookahead.switched_worst"] = found["crossover"]["worst"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bed", type=Path, default=Path.home() / ".cache" / "rl_accel" / "lookahead_bed")
    parser.add_argument("--as-is", action="store_true", help="take the bed as it is there")
    parser.add_argument("--layers", type=int, default=24, help="of the target")
    parser.add_argument("--what", default="speed,identity,crossover")
    parser.add_argument("--arms", default="plain,ngram,das,model,look,look+das,look+model,look+hint")
    parser.add_argument("--problems", default="long")
    parser.add_argument("--temperatures", default="1.0")
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--texts", type=int, default=8, help="in a block")
    parser.add_argument("--at-a-time", type=int, default=1)
    parser.add_argument("--identity", type=int, default=512, help="problems that are compared")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--max-draft", type=int, default=16, help="longest token draft of das and hints")
    parser.add_argument("--draft-length", type=int, default=8, help="token draft of `model`")
    parser.add_argument("--switched", default="look+hint", help="arm of the crossover")
    parser.add_argument("--threads", type=int, default=1, help="1: an engine computes on one core; 0: vLLM's choice")
    args = parser.parse_args()
    bed = Bed(args.bed) if args.as_is else make_bed(args.bed, BedSettings(layers=args.layers))
    found: dict[str, Any] = {"layers": args.layers, "draft_length": args.draft_length, "max_draft": args.max_draft}
    try:
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(main_async(args, bed, Path(folder), found))
    finally:
        found["rows"] = rows_of(found)
        print(json.dumps(found, indent=1))
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
