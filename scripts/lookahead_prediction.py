"""What the arms of bench_lookahead.py would take if nothing disturbed anything, from parts that are measured alone.

Lookahead: the shipped core on the virtual clock, with the seconds of steps that were written one after the other.
Drafting ahead: `rl_accel/draft/ahead/predict.py`, with the tokens that the draft has right behind the target's, the
seconds of a token of each, and those of a request of one token.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lookahead_arms import MAX_TOKENS, SEED, Arm, Problem, Writer
from transformers import AutoModelForCausalLM

from rl_accel.draft.ahead.lean import Model, model_of
from rl_accel.draft.ahead.messages import Sampling
from rl_accel.draft.ahead.predict import predicted_seconds
from rl_accel.draft.ahead.writer import Text
from rl_accel.lookahead import clock, formulas
from rl_accel.lookahead.core import Limits, Lookahead
from rl_accel.lookahead.simulate import Script, ScriptedEngine
from rl_accel.lookahead.verify import Exact
from rl_accel.sampling.keys import request_key

VERIFIED = 31
"""Tokens behind the prompt whose prefill says what verifying one costs; fewer than a block of the prefix cache."""


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


async def predict_lookahead(
    writer: Writer, arm: Arm, problems: Sequence[Problem], temperature: float
) -> dict[str, Any]:
    """Return what the core makes of these steps on the virtual clock, where engines do not disturb each other."""
    texts = [await write_alone(writer, arm, problem, temperature) for problem in problems]
    target = [s for text in texts for s in text.target_s]
    draft = [s for text in texts for s in text.draft_s]
    ratio = statistics.median(draft) / statistics.median(target)
    depth = min(arm.depth, max(2, formulas.full_depth(ratio)))
    seconds = await asyncio.to_thread(lambda: sum(_on_virtual_clock(text, arm.hint, depth) for text in texts))
    agrees = [flag for text in texts for flag in text.agrees]
    return {
        "predicted_ms_per_token": 1e3 * seconds / sum(text.num_tokens for text in texts),
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


def agreement(draft: Model, problem: Problem, token_ids: Sequence[int], temperature: float) -> tuple[list[bool], float]:
    """Return whether the draft has each token behind those of the target before it, and its seconds a token."""
    key = request_key(SEED, problem.problem_id, 0, 0, True)
    text = Text(draft.new_cache(), problem.prompt_token_ids, Sampling(key, temperature), limit=1 << 30)
    agrees, seconds = [], []
    for position, token in enumerate(token_ids, len(problem.prompt_token_ids)):
        started = time.perf_counter()
        agrees.append(text.write(draft) == token)
        seconds.append(time.perf_counter() - started)
        text.verify(position, [token])
    return agrees, statistics.median(seconds)


async def _one_token(writer: Writer, arm: Arm, problem: Problem, temperature: float, behind: Sequence[int]) -> float:
    """Return the seconds of a request of one token, of which what is in the prefix cache is not computed."""
    started = time.perf_counter()
    engine = writer.endpoint(arm.target, problem, temperature, True, False)
    await engine.step([*problem.prompt_token_ids, *behind], 1)
    return time.perf_counter() - started


async def predict_ahead(
    writer: Writer, bed_draft: Path, max_draft: int, problems: Sequence[Problem], temperature: float
) -> dict[str, Any]:
    """Return what drafting ahead would take, the target's engine being plain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    draft = model_of(AutoModelForCausalLM.from_pretrained(bed_draft, dtype=torch.float32).eval())
    plain = Arm.named("plain")
    took = tokens = 0.0
    shares, draft_s, step_s, verify_s = [], [], [], []
    for problem in problems:
        written = await writer.write(plain, problem, temperature)
        behind = written.token_ids[:VERIFIED][::-1]  # what nobody has in a prefix cache
        first_s, longer_s = [await _one_token(writer, plain, problem, temperature, ids) for ids in ([], behind)]
        token_s = (written.seconds - first_s) / max(len(written.token_ids) - 1, 1)
        verify_s.append(max(longer_s - first_s, 0.0) / len(behind))
        agrees, seconds = agreement(draft, problem, written.token_ids, temperature)
        took += first_s + predicted_seconds(agrees[1:], seconds, token_s, max_draft, verify_s[-1])
        tokens += len(written.token_ids)
        shares.append(statistics.fmean(agrees))
        draft_s.append(seconds)
        step_s.append(token_s)
    torch.set_num_threads(threads)
    return {
        "predicted_ms_per_token": 1e3 * took / tokens, "token_agreement": statistics.fmean(shares),
        "draft_token_ms": 1e3 * statistics.median(draft_s), "target_token_ms": 1e3 * statistics.median(step_s),
        "verified_token_ms": 1e3 * statistics.median(verify_s),
    }  # fmt: skip
