"""The proxy in a process of its own before a real vLLM server, asked by the `openai` client: answers, limits, leaks."""

from __future__ import annotations

import asyncio
import os
import random
import re
import sys
import time
import urllib.error
import urllib.request

import aiohttp
import openai
import psutil
import pytest
from transformers import AutoTokenizer

from rl_accel.lookahead import serve
from rl_accel.lookahead.endpoint import TokenEndpoint
from rl_accel.lookahead.text import GrowingText, delimiter_ids
from rl_accel.quickstart import problems
from rl_accel.quickstart.deep import POLICY

from .conftest import free_port, serving

KEY, MAX_TOKENS, MAX_REQUESTS = "a secret", 100, 10
TOKENIZER = AutoTokenizer.from_pretrained(POLICY)
QUESTIONS = [problem.question for problem in problems.generate(40, seed=9)]


def start(target: str, draft: str, log, *options: str):
    port = free_port()
    command = [sys.executable, "-m", "rl_accel.lookahead.serve", "--target", target, "--draft", draft]
    command += ["--tokenizer", "quickstart", "--model", "policy", "--port", str(port), "--max-tokens", str(MAX_TOKENS)]
    command += ["--max-requests", str(MAX_REQUESTS), *options]
    return serving(command, port, log, RL_ACCEL_LOOKAHEAD_KEY=KEY)


@pytest.fixture(scope="module")
def proxy(url, tmp_path_factory):
    with start(url, url, tmp_path_factory.mktemp("proxy") / "log", "--always", "--depth", "3") as found:
        yield found


@pytest.fixture(scope="module")
def client(proxy):
    return openai.OpenAI(base_url=f"{proxy}/v1", api_key=KEY, max_retries=0)


def ask(client, number: int, **options):
    messages = [{"role": "user", "content": QUESTIONS[number]}]
    return client.chat.completions.create(model="policy", messages=messages, seed=number, **options)


def metrics(url: str) -> dict[str, float]:
    text = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
    return {name: float(value) for name, value in re.findall(r"^([a-z_:]+)(?:{[^}]*})? (\S+)$", text, re.M)}


def targets_own(url: str, number: int, temperature: float) -> str:
    """The answer to a seed in one request, without the proxy."""

    async def run():
        messages = [{"role": "user", "content": QUESTIONS[number]}]
        prompt = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        identity = {"problem_id": f"seed/{number}", "sample_index": 0, "step": 0, "validate": False}
        async with aiohttp.ClientSession() as session:
            end = [TOKENIZER.eos_token_id]
            sampling = {"temperature": temperature, "extra_args": {"rl_accel": identity}}
            engine = TokenEndpoint(session, url, sampling, delimiters=(), end_token_ids=end)
            return (await engine.step(prompt, MAX_TOKENS)).token_ids

    return TOKENIZER.decode(asyncio.run(run()), skip_special_tokens=True)


def test_answers_are_the_targets_own_whole_and_streamed(client, url) -> None:
    for number, temperature in ((0, 0.0), (1, 1.0), (2, 1.0), (3, 0.6)):
        expected = targets_own(url, number, temperature)
        whole = ask(client, number, temperature=temperature)
        assert whole.choices[0].message.content == expected and expected.strip()
        assert whole.choices[0].finish_reason in ("stop", "length")
        options = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = list(ask(client, number, temperature=temperature, **options))
        texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
        assert "".join(texts) == expected and len(texts) >= 2
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_completions_take_text_and_token_ids(client) -> None:
    ids = TOKENIZER("3 + 4 =")["input_ids"]
    found = [
        client.completions.create(model="policy", prompt=prompt, seed=1, max_tokens=12) for prompt in ("3 + 4 =", ids)
    ]
    assert found[0].choices[0].text == found[1].choices[0].text
    assert found[0].usage.completion_tokens <= 12


def test_what_is_not_served_is_refused_with_a_reason(client, proxy) -> None:
    for options, message in (
        ({"n": 2}, "does not serve n"), ({"stop": ["x"]}, "does not serve stop"), ({"max_tokens": -1}, "positive"),
        ({"temperature": "hot"}, "no number"), ({"extra_body": {"seed": "x"}}, "no integer"),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError, match=message):
            ask(client, 0, **options)
    with pytest.raises(openai.BadRequestError, match="cannot be read"):
        client.completions.create(model="policy", prompt=[10**9])
    with pytest.raises(openai.NotFoundError, match="the model is policy"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.AuthenticationError):
        ask(openai.OpenAI(base_url=f"{proxy}/v1", api_key="guess", max_retries=0), 0)
    request = urllib.request.Request(f"{proxy}/v1/completions", b"[" * 100_000, {"authorization": f"Bearer {KEY}"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    assert refused.value.code == 400
    request = urllib.request.Request(f"{proxy}/v1/completions", b"x" * (5 << 20), {"authorization": f"Bearer {KEY}"})
    with pytest.raises((urllib.error.HTTPError, urllib.error.URLError)):
        urllib.request.urlopen(request, timeout=10)
    assert [model.id for model in client.models.list()] == ["policy"]


def test_hints_and_other_drafts_change_no_answer(url, tmp_path) -> None:
    """Two drafts of each next step, and the target is given them as its token drafts."""
    before = metrics(url)
    with start(url, url, tmp_path / "log", "--always", "--hint", "--width", "2") as proxy:
        client = openai.OpenAI(base_url=f"{proxy}/v1", api_key=KEY, max_retries=0)
        for number, temperature in ((4, 0.0), (5, 1.0), (6, 1.0), (7, 0.6)):
            found = ask(client, number, temperature=temperature)
            assert found.choices[0].message.content == targets_own(url, number, temperature)
        here, there = metrics(proxy), metrics(url)
    assert here["rl_accel_lookahead_draft_steps_total"] > 4
    accepted = "vllm:spec_decode_num_accepted_tokens_total"
    assert there[accepted] - before.get(accepted, 0.0) > 20


def resident_bytes(proxy: str) -> int:
    """Memory of the process behind a URL."""
    port = proxy.rpartition(":")[2]
    (found,) = [child for child in psutil.Process().children() if port in child.cmdline()]
    return found.memory_info().rss


def test_clients_that_leave_leave_nothing_behind(proxy, url) -> None:
    """200 requests, at most 6 at a time, of which about half are cut off somewhere; then both servers are idle."""
    num_requests = int(200 * float(os.environ.get("RL_ACCEL_SOAK", "1")))
    generator = random.Random(0)
    before = metrics(proxy)

    async def one(client, number: int, places: asyncio.Semaphore) -> None:
        async with places:
            request = client.chat.completions.create(
                model="policy", messages=[{"role": "user", "content": QUESTIONS[number % 40]}],
                stream=generator.random() < 0.5,
            )  # fmt: skip
            patience = generator.random() * 0.4 if generator.random() < 0.5 else 60
            try:
                async with asyncio.timeout(patience):
                    found = await request
                    if hasattr(found, "__aiter__"):
                        async with found:
                            async for _ in found:
                                pass
            except (TimeoutError, openai.RateLimitError):
                pass  # who has left is noticed a moment later, and until then counts as running

    async def run(numbers: range) -> None:
        async with openai.AsyncOpenAI(base_url=f"{proxy}/v1", api_key=KEY, max_retries=0) as client:
            places = asyncio.Semaphore(6)
            await asyncio.gather(*(one(client, number, places) for number in numbers))

    asyncio.run(run(range(num_requests // 2)))
    resident = resident_bytes(proxy)
    asyncio.run(run(range(num_requests // 2, num_requests)))
    assert resident_bytes(proxy) - resident < 16 << 20
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        here, there = metrics(proxy), metrics(url)
        running = [here["rl_accel_lookahead_requests_running"]]
        running += [there[f"vllm:num_requests_{state}"] for state in ("running", "waiting")]
        if not any(running):
            break
        time.sleep(0.3)
    assert running == [0, 0, 0]
    assert here["rl_accel_lookahead_requests_total"] - before["rl_accel_lookahead_requests_total"] > 0.75 * num_requests
    assert here["rl_accel_lookahead_cancelled_total"] - before["rl_accel_lookahead_cancelled_total"] > 20
    assert here["rl_accel_lookahead_failed_total"] == before["rl_accel_lookahead_failed_total"]
    assert here["rl_accel_lookahead_draft_steps_total"] > 0
    assert there["vllm:kv_cache_usage_perc"] == 0


def test_more_requests_than_may_run_are_refused(proxy) -> None:
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{proxy}/v1", api_key=KEY, max_retries=0) as client:
            asked = [
                client.completions.create(model="policy", prompt=QUESTIONS[i % 40], temperature=1.0) for i in range(80)
            ]
            return await asyncio.gather(*asked, return_exceptions=True)

    found = asyncio.run(run())
    refused = [error for error in found if isinstance(error, openai.RateLimitError)]
    assert refused and "running" in str(refused[0])
    assert len(found) - len(refused) >= MAX_REQUESTS
    assert not [
        error for error in found if isinstance(error, Exception) and not isinstance(error, openai.APIStatusError)
    ]


def test_a_lost_draft_server_is_survived_and_a_lost_target_is_said(url, tmp_path) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    with start(nowhere, url, tmp_path / "b") as found:
        client = openai.OpenAI(base_url=f"{found}/v1", api_key=KEY, max_retries=0)
        with pytest.raises(openai.InternalServerError, match="cannot be reached"):
            ask(client, 4)
    with start(url, nowhere, tmp_path / "a", "--always") as found:
        client = openai.OpenAI(base_url=f"{found}/v1", api_key=KEY, max_retries=0)
        assert ask(client, 4, temperature=1.0).choices[0].message.content == targets_own(url, 4, 1.0)
        ask(client, 5)
        assert metrics(found)["rl_accel_lookahead_drafts_lost_total"] == 2
    log = (tmp_path / "a").read_text()
    assert log.count("decoding goes on without drafts") == 1


def test_options_that_cannot_work_are_named(capsys) -> None:
    base = ["--target", "http://x", "--draft", "http://y", "--tokenizer"]
    for options, message in (
        ([*base, "quickstart", "--verifier", "numbers"], "--allow-lossy"),
        ([*base, "quickstart", "--depth", "0"], "at least 1"),
        ([*base, "quickstart", "--delimiter", "no such text"], "no token holds it"),
        ([*base, "/nowhere/at/all"], "--tokenizer"),
    ):
        assert serve.main(options) == 2
        assert message in capsys.readouterr().err


def test_text_grows_by_whole_characters() -> None:
    ids = TOKENIZER("a café costs 5 €\nnext")["input_ids"]
    text = GrowingText(TOKENIZER)
    parts = [text.add([token], last=i == len(ids) - 1) for i, token in enumerate(ids)]
    assert "".join(parts) == TOKENIZER.decode(ids) and "\ufffd" not in "".join(parts)
    assert all("\n" in TOKENIZER.decode([token]) for token in delimiter_ids(TOKENIZER, "\n"))
