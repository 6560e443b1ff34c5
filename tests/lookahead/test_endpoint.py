"""Lookahead over a real vLLM server with exact sampling: the tokens of one plain request, and nothing left behind.

Target and draft are the same server: with the same identity the draft has the target's noise and is always right, with
another identity it is a draft that is right now and then.
"""

from __future__ import annotations

import asyncio
import re
import time
import urllib.request

import aiohttp
import pytest
from transformers import AutoTokenizer

from rl_accel.errors import LookaheadError
from rl_accel.lookahead.core import Counts, Limits, Lookahead
from rl_accel.lookahead.endpoint import TokenEndpoint
from rl_accel.lookahead.text import delimiter_ids
from rl_accel.lookahead.verify import Exact
from rl_accel.quickstart import problems
from rl_accel.quickstart.deep import POLICY

MAX_TOKENS, NUM_PROBLEMS = 120, 12
TOKENIZER = AutoTokenizer.from_pretrained(POLICY)
DELIMITERS = delimiter_ids(TOKENIZER, "\n")


def prompt_ids(number: int) -> list[int]:
    messages = [{"role": "user", "content": PROBLEMS[number].question}]
    return list(TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])


PROBLEMS = problems.generate(NUM_PROBLEMS, seed=5)


def endpoint(session, url, number: int, temperature: float, step: int = 1, **others) -> TokenEndpoint:
    identity = {"problem_id": f"p{number}", "sample_index": 0, "step": step, "validate": False}
    sampling = {"temperature": temperature, "extra_args": {"rl_accel": identity}, **others}
    return TokenEndpoint(
        session, url, sampling, delimiters=DELIMITERS, end_token_ids=[TOKENIZER.eos_token_id], model=str(POLICY)
    )


async def plain(session, url, number: int, temperature: float) -> tuple[int, ...]:
    """One request, which no delimiter ends."""
    whole = endpoint(session, url, number, temperature)
    whole.delimiters, whole.sampling["stop_token_ids"] = frozenset(), [TOKENIZER.eos_token_id]
    return (await whole.step(prompt_ids(number), MAX_TOKENS)).token_ids


async def ahead(session, url, number: int, temperature: float, draft_step: int, counts: Counts, **options) -> list[int]:
    target = endpoint(session, url, number, temperature)
    draft = endpoint(session, url, number, temperature, draft_step)
    core = Lookahead(target, draft, Exact(), Limits(MAX_TOKENS, 40), lambda: 4, counts=counts, **options)
    return [token async for final in core.steps(prompt_ids(number)) for token in final.step.token_ids]


def in_session(function):
    async def main():
        async with aiohttp.ClientSession() as session:
            return await function(session)

    return asyncio.run(main())


def running(url: str) -> float:
    text = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
    names = ("running", "waiting")
    return sum(float(x) for n in names for x in re.findall(rf"^vllm:num_requests_{n}{{.*}} (\S+)$", text, re.M))


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_tokens_are_those_of_one_plain_request(url, temperature) -> None:
    """Several texts at a time, with the target's own noise in the draft, with other noise, and with two drafts."""

    async def run(session):
        numbers = range(NUM_PROBLEMS)
        expected = [list(await plain(session, url, number, temperature)) for number in numbers]
        same, other = Counts(), Counts()
        found = await asyncio.gather(*(ahead(session, url, n, temperature, 1, same) for n in numbers))
        assert found == expected
        found = await asyncio.gather(*(ahead(session, url, n, temperature, 2, other, width=2) for n in numbers))
        assert found == expected
        return same, other

    same, other = in_session(run)
    # A draft that is the target is right wherever it is in time; it is no faster, so a busy machine makes many late.
    assert same.accepted == same.compared - same.late_drafts > 0
    assert other.compared > NUM_PROBLEMS
    assert other.accepted < other.compared or temperature < 1.0


def test_leaving_early_leaves_no_request_behind(url) -> None:
    async def run(session):
        for number in range(NUM_PROBLEMS):
            target, draft = (endpoint(session, url, number, 1.0, step) for step in (1, 2))
            core = Lookahead(target, draft, Exact(), Limits(MAX_TOKENS), lambda: 6)
            steps = core.steps(prompt_ids(number))
            for _ in range(number % 3):
                await anext(steps)
            await steps.aclose()

    in_session(run)
    deadline = time.monotonic() + 20
    while running(url) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert running(url) == 0


def test_log_probs_come_along(url) -> None:
    async def run(session):
        return await endpoint(session, url, 0, 1.0, logprobs=0).step(prompt_ids(0), 30)

    step = in_session(run)
    assert len(step.logprobs) == len(step.token_ids) and all(-20 < logprob <= 0 for logprob in step.logprobs)


def test_what_cannot_be_served_is_named(url) -> None:
    async def ask(session, url, **others):
        return await endpoint(session, url, 0, 1.0, **others).step(prompt_ids(0), 20)

    for others, message in (({"stop": ["x"]}, "stop"), ({"n": 2}, "serve n"), ({"top_p": 7.0}, "answers 400")):
        with pytest.raises(LookaheadError, match=message):
            in_session(lambda session, others=others: ask(session, url, **others))
    with pytest.raises(LookaheadError, match="answers 404"):
        in_session(lambda session: ask(session, f"{url}/nowhere"))


def test_a_draft_server_that_is_not_there_is_plain_decoding(url) -> None:
    counts = Counts()

    async def run(session):
        target = endpoint(session, url, 0, 1.0)
        draft = endpoint(session, "http://127.0.0.1:9", 0, 1.0)
        core = Lookahead(target, draft, Exact(), Limits(MAX_TOKENS), lambda: 4, counts=counts)
        found = [token async for final in core.steps(prompt_ids(0)) for token in final.step.token_ids]
        assert found == list(await plain(session, url, 0, 1.0))

    in_session(run)
    assert counts.drafts_lost == 1 and counts.accepted == 0
