"""The verifier `judge` before servers that answer as they are told."""

from __future__ import annotations

import asyncio
import itertools
import logging
from functools import partial

import pytest
from aiohttp import web
from transformers import AutoTokenizer

from rl_accel.lookahead import judge
from rl_accel.lookahead.judge import Judge
from rl_accel.lookahead.step import Step
from rl_accel.quickstart.deep import POLICY

from .loops import in_session, listening

TOKENIZER = AutoTokenizer.from_pretrained(POLICY)
DECODE = partial(TOKENIZER.decode, skip_special_tokens=True)
NOWHERE = "http://127.0.0.1:9"


class ScriptedJudge:
    """Answers as it is told; keeps what it was asked."""

    def __init__(self, answer="yes", seconds: float = 0.0):
        self.answer, self.seconds = answer, seconds
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        self.running = self.most_running = self.left = 0

    async def reply(self, request: web.Request) -> web.Response:
        assert request.path == "/v1/chat/completions"
        self.asked.append(await request.json())
        self.keys.append(request.headers.get("authorization"))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.left += 1
            raise
        finally:
            self.running -= 1
        if isinstance(self.answer, web.Response):
            return self.answer
        usage = {"prompt_tokens": 100, "completion_tokens": 1}
        return web.json_response({"choices": [{"message": {"content": self.answer}}], "usage": usage})


def words(text: str) -> Step:
    return Step(tuple(TOKENIZER(text)["input_ids"]))


async def verdict(session, answer, **options) -> tuple[bool, Judge]:
    async with listening(ScriptedJudge(answer).reply) as where:
        found = Judge(session, where, "m", DECODE, **options)
        return await found.agree(words("1 + 1").token_ids, words("= 2\n"), words("is 2\n")), found


@pytest.mark.parametrize(
    ("answer", "agrees"), [("yes", True), ("Yes.", True), (" YES\n", True), ("no", False), ("No!", False)]
)
def test_a_judges_word_counts(answer, agrees) -> None:
    async def run(session):
        return await verdict(session, answer)

    found, verifier = in_session(run)
    assert found is agrees and verifier.cost.calls == 1 and verifier.cost.failures == 0
    assert verifier.cost.tokens == 100


@pytest.mark.parametrize(
    "answer",
    [
        "maybe", "", "yes and no", "yes, but", "<think>yes", "not yes", "yesyes", "oui", "y", None, ["yes"], {"yes": 1},
        web.Response(text="yes"), web.Response(text="{", content_type="application/json"), web.Response(status=500),
        web.json_response([]), web.json_response({"choices": []}), web.json_response({"error": "yes"}, status=401),
        web.json_response("yes"), web.json_response({"choices": [{"message": None}]}), web.Response(text="[" * 10**5),
        web.json_response({"choices": [{"message": {"content": "yes"}}], "usage": {"prompt_tokens": "many"}}),
        web.Response(status=302, headers={"location": NOWHERE}),
    ],
)  # fmt: skip
def test_anything_else_is_no_verdict(answer, caplog) -> None:
    async def run(session):
        return await verdict(session, answer)

    found, verifier = in_session(run)
    assert not found and (verifier.cost.calls, verifier.cost.failures) == (1, 1)
    assert [record.levelname for record in caplog.records if record.name.startswith("rl_accel")] == ["WARNING"]


def test_failures_are_counted_and_logged_once(caplog) -> None:
    async def run(session):
        found = Judge(session, NOWHERE, None, DECODE)
        steps = [words(f"= {i}\n") for i in range(6)]
        assert not any([await found.agree((), a, b) for a, b in itertools.pairwise(steps)])
        return found

    with caplog.at_level(logging.DEBUG, "rl_accel"):
        cost = in_session(run).cost
    assert cost.calls == cost.failures == 5 and cost.tokens == 0
    assert caplog.text.count("gave no verdict") == 1 and NOWHERE in caplog.text


def test_what_a_judge_is_asked() -> None:
    heard = ScriptedJudge()
    before = "x" * 50 + " so far 7 and 8\n"

    async def run(session):
        async with listening(heard.reply) as where:
            for key, model_name, chars in (("secret", "m", 9), (None, None, 0), (None, None, 1000)):
                found = Judge(session, f"{where}/", model_name, DECODE, key, prefix_chars=chars)
                assert await found.agree(words(before).token_ids, words("{draft} is 15\n"), words("own is 15\n"))

    in_session(run)
    assert heard.keys == ["Bearer secret", None, None]
    assert [body.get("model") for body in heard.asked] == ["m", None, None]
    for body, told in zip(heard.asked, (before[-9:], "", before), strict=True):
        assert body["temperature"] == 0 and body["max_tokens"] <= 8
        (message,) = body["messages"]
        assert message["content"] == judge.QUESTION.format(before=told, a="{draft} is 15", b="own is 15")


def test_so_many_requests_at_a_time_and_no_more() -> None:
    heard = ScriptedJudge(seconds=0.02)

    async def run(session):
        async with listening(heard.reply) as where:
            found = Judge(session, where, None, DECODE, max_requests=3)
            assert all(
                await asyncio.gather(*(found.agree((), words(f"= {i}\n"), words(f"is {i}\n")) for i in range(12)))
            )
            return found.cost

    cost = in_session(run)
    assert heard.most_running == 3 and len(heard.asked) == cost.calls == 12
    assert cost.seconds >= 0.02 * 3 * (1 + 2 + 3 + 4) * 0.9, "waiting for a turn is in it"


def test_a_judge_that_hangs_costs_the_time_limit_and_is_let_go(caplog) -> None:
    """Of five verdicts only two get a turn; all are there in time, and no request is left in the server."""
    heard = ScriptedJudge(seconds=60)

    async def run(session):
        clock = asyncio.get_running_loop().time
        async with listening(heard.reply) as where:
            found = Judge(session, where, None, DECODE, timeout_s=0.3, max_requests=2)
            started = clock()
            asked = (found.agree((), words(f"= {i}\n"), words(f"is {i}\n")) for i in range(5))
            assert not any(await asyncio.gather(*asked))
            assert 0.3 <= clock() - started < 3
            assert found.cost.failures == 5 and heard.most_running == 2
            cancelled = asyncio.create_task(found.agree((), words("= 9\n"), words("is 9\n")))
            await asyncio.sleep(0.1)
            cancelled.cancel()
            await asyncio.wait([cancelled])
            assert cancelled.cancelled() and found.cost.failures == 5 and found.cost.calls == 6
            for _ in range(50):
                if not heard.running:
                    break
                await asyncio.sleep(0.05)
            assert heard.running == 0 and heard.left >= 2
            heard.seconds = 0.0
            assert await found.agree((), words("= 9\n"), words("is 9\n")), "its turns are free again"

    in_session(run)
    assert "no answer in 0.3 s" in caplog.text
