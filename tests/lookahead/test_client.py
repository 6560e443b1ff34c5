"""What an agent loop of verl generates with: the texts of verl's own client, step by step over a real server."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import aiohttp
import pytest
from transformers import AutoTokenizer

from rl_accel import recipes
from rl_accel.config import AccelConfig
from rl_accel.errors import LookaheadError
from rl_accel.hosts.verl.session import SessionClient
from rl_accel.lookahead.endpoint import TokenEndpoint
from rl_accel.lookahead.hosts.agent_loop import LookaheadAgentLoop
from rl_accel.lookahead.hosts.client import mask_drafts
from rl_accel.quickstart.deep import POLICY
from rl_accel.quickstart.problems import generate

SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "logprobs": True}


class Client:
    """Stands for verl's `LLMServerClient` before one server: the whole text in one request."""

    def __init__(self, url: str):
        self.url, self.held, self.asked = url, 0, 0

    async def _acquire_server(self, request_id, **extra):
        self.held += 1
        return self.url.removeprefix("http://"), None

    def _release_server(self, server_id, request_id) -> None:
        self.held -= 1

    async def generate(self, request_id, *, prompt_ids, sampling_params, **kwargs):
        self.asked += 1
        sampling = {**sampling_params, "logprobs": 0}
        async with aiohttp.ClientSession() as session:
            engine = TokenEndpoint(session, self.url, sampling, delimiters=(), end_token_ids=(END,))
            step = await engine.step(prompt_ids, 96)
        return SimpleNamespace(token_ids=list(step.token_ids), log_probs=list(step.logprobs))


TOKENIZER = AutoTokenizer.from_pretrained(POLICY)
END = TOKENIZER.eos_token_id


def role_of(draft: str, **settings) -> LookaheadAgentLoop:
    config = recipes.compose("gsm8k_grpo/cpu", ["data.max_response_length=96"], has_gpu=False)
    values = {"draft": draft, "phases": "all", "adaptive": False, **settings}
    found = AccelConfig.from_mapping({"lookahead": values}).lookahead
    role = LookaheadAgentLoop(found, SimpleNamespace(config=config, tokenizer=TOKENIZER))
    role._url = draft  # in a run an actor of Ray knows it
    return role


def prompts(num: int) -> list[list[int]]:
    return [
        list(TOKENIZER.apply_chat_template([{"role": "user", "content": p.question}], add_generation_prompt=True,
                                           return_dict=True, tokenize=True)["input_ids"])
        for p in generate(num, seed=9, split="test")
    ]  # fmt: skip


def run(role: LookaheadAgentLoop, inner: Client, num: int = 6, validate: bool = False, **media):
    """Return outputs and the role's clients, of a session a prompt."""

    async def session(number: int, prompt: list[int]):
        client = role.client(inner, validate)
        identity = {"problem_id": f"p{number}", "sample_index": 0, "step": 3, "validate": validate}
        output = await SessionClient(client, identity).generate(
            f"r{number}", prompt_ids=prompt, sampling_params=dict(SAMPLING), **media
        )
        return output, client

    async def all_of_them():
        try:
            return await asyncio.gather(*(session(n, p) for n, p in enumerate(prompts(num))))
        finally:
            if role._session is not None:
                await role._session.close()

    return asyncio.run(all_of_them())


@pytest.fixture(scope="module")
def plain(url):
    """Texts and log-probs of verl's own way."""
    role = role_of(url, phases="validation")
    found = run(role, Client(url))
    assert all(client.__class__ is Client for _, client in found)
    return [output for output, _ in found]


@pytest.mark.parametrize("hint", [False, True])
def test_texts_and_log_probs_are_those_of_verls_client(url, plain, hint) -> None:
    """With hints the policy's step waits for its draft, so that none comes late: here that is the policy itself."""
    inner, role = Client(url), role_of(url, hint=hint)
    found = [output for output, _ in run(role, inner)]
    assert [output.token_ids for output in found] == [output.token_ids for output in plain]
    for output, wanted in zip(found, plain, strict=True):
        assert output.log_probs == pytest.approx(wanted.log_probs, abs=1e-4)
        assert output.stop_reason == "completed" and output.extra_fields["global_steps"] == 3
    assert inner.asked == inner.held == 0
    metrics = role.drain()
    assert metrics["training/drafted_texts"] == metrics["training/texts"] == 6
    if hint:
        assert metrics["training/steps_from_draft"] >= 0.9 * metrics["training/steps"], "but for steps cut by the limit"
    assert metrics["training/failed_texts"] == metrics["validation/texts"] == 0
    assert role.drain()["training/texts"] == 0


def test_a_lost_draft_server_is_plain_decoding(plain, url) -> None:
    inner, role = Client(url), role_of("http://127.0.0.1:9")
    found = run(role, inner)
    assert [output.token_ids for output, _ in found] == [output.token_ids for output in plain]
    metrics = role.drain()
    assert metrics["training/drafts_lost"] == 6 and metrics["training/failed_texts"] == 0


def test_a_text_that_fails_goes_verls_way(plain, url, caplog) -> None:
    """The balancer names a server whose port nobody listens at; its own way by Ray would still work."""

    class Elsewhere(Client):
        async def _acquire_server(self, request_id, **extra):
            self.held += 1
            return "127.0.0.1:9", None

    inner, role = Elsewhere(url), role_of(url)
    with caplog.at_level("WARNING", "rl_accel.lookahead.hosts.agent_loop"):
        found = run(role, inner)
    assert [output.token_ids for output, _ in found] == [output.token_ids for output in plain]
    assert inner.asked == 6 and inner.held == 0
    assert role.drain()["training/failed_texts"] == 6
    assert caplog.text.count("cannot be written step by step") == 1


def test_pictures_go_verls_way(url) -> None:
    inner, role = Client(url), role_of(url)
    run(role, inner, num=2, image_data=["a picture"])
    assert inner.asked == 2 and role.drain()["training/drafted_texts"] == 0


def test_drafts_of_a_lossy_verifier_stay_out_of_the_loss(url) -> None:
    """Marked as the draft's, and scored by the policy, which the draft is here, too."""
    inner, role = Client(url), role_of(url, verifier="always", hint=True)
    (found,) = run(role, inner, num=1)
    output, client = found
    token_ids, from_draft = client.generated[0]
    assert token_ids == output.token_ids and any(from_draft)
    wanted = run(role_of(url, phases="validation"), inner, num=1)[0][0]
    assert output.token_ids == wanted.token_ids, "one policy, one noise"
    assert output.log_probs == pytest.approx(wanted.log_probs, abs=1e-4)
    loop = SimpleNamespace(response_ids=list(token_ids), response_mask=[1] * len(token_ids))
    mask_drafts([loop], client.generated)
    assert loop.response_mask == [int(not flag) for flag in from_draft]


def test_masks_follow_what_was_generated_and_refuse_what_was_not() -> None:
    generated = [([1, 2, 3], [True, True, False]), ([4, 5], [False, True])]
    tool = SimpleNamespace(response_ids=[1, 2, 3, 9, 9, 4, 5], response_mask=[1, 1, 1, 0, 0, 1, 1])
    mask_drafts([tool], generated)
    assert tool.response_mask == [0, 0, 1, 0, 0, 1, 0]
    several = [SimpleNamespace(response_ids=ids, response_mask=[1] * len(ids)) for ids in ([1, 2, 3], [4])]
    mask_drafts(several, generated)
    assert [output.response_mask for output in several] == [[0, 0, 1], [1]]
    other = SimpleNamespace(response_ids=[7, 2, 3], response_mask=[1, 1, 1])
    with pytest.raises(LookaheadError, match="other tokens than were generated"):
        mask_drafts([other], generated)
    mask_drafts([other], [([1, 2, 3], [False] * 3)])
    assert other.response_mask == [1, 1, 1], "nothing came from a draft, so nothing needs to be known"
