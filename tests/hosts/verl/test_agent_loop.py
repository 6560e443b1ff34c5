"""Agent loops that generate more than once a session: independent texts, rows of their own, numbers that last."""

from __future__ import annotations

import asyncio
import copy
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from rl_accel.hosts.verl.session import SessionClient

from .trainings import tokens_of

IDENTITY = {"problem_id": "p", "sample_index": 1, "step": 2, "validate": False}


def test_every_output_has_a_row_and_a_text_of_its_own(best_of_run, plain_run) -> None:
    """The first text of a session is that of a session which generates once, under the same name."""
    found, single = tokens_of(best_of_run.run, 1), tokens_of(plain_run, 1)
    first = {key: text for key, text in found.items() if "[output" not in key[0]}
    assert first == single
    assert set(found) == {(f"{p}{o}", s) for p, s in single for o in ("", " [output 1]", " [output 2]")}
    differing = sum(
        len({tuple(found[f"{problem}{output}", sample]) for output in ("", " [output 1]", " [output 2]")}) > 1
        for problem, sample in single
    )
    # The tiny policy gives some texts with probability 0.4, so three may coincide (6 %); once all of a session's did.
    assert differing >= len(single) * 3 // 4


def test_the_step_is_measured_over_all_outputs(best_of_run) -> None:
    for step in (1, 2):
        metrics = best_of_run.run.metrics()[step]
        assert metrics["rollout/num_response_tokens"] == sum(map(len, tokens_of(best_of_run.run, step).values()))
        assert metrics["rl_accel/rollout/malformed_identities"] == 0
        assert metrics["training/rollout_probs_diff_max"] < 1e-4


class Remote:
    """Stands for a method of a Ray actor."""

    def __init__(self, answer):
        self.answer = answer

    async def remote(self, *args, **kwargs):
        return self.answer(*args, **kwargs)


def test_a_generation_that_is_sent_again_keeps_its_number() -> None:
    """verl's asynchronous client re-sends what the engine aborted for new weights, with the tokens so far."""
    from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient
    from verl.workers.rollout.replica import TokenOutput

    sent = []

    def serve(prompt_ids, sampling_params, **_):
        sent.append((len(prompt_ids), dict(sampling_params["extra_args"]["rl_accel"])))
        stop = "aborted" if len(sent) in (1, 3) else "completed"
        return TokenOutput(token_ids=[7, 8], log_probs=[0.0, 0.0], stop_reason=stop, extra_fields={"global_steps": 1})

    balancer = SimpleNamespace(
        require_acquire_fields=Remote(list),
        require_release_fields=Remote(list),
        acquire_server=Remote(lambda **_: ("s", SimpleNamespace(generate=Remote(serve)))),
        release_server=SimpleNamespace(remote=lambda **_: None),
    )
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": {"name": "vllm", "response_length": 16}}})
    client = SessionClient(FullyAsyncLLMServerClient(config, balancer), IDENTITY)

    async def session():
        for _ in range(2):
            text = await client.generate("r", prompt_ids=[1, 2, 3], sampling_params={"temperature": 1.0})
            assert text.token_ids == [7, 8, 7, 8]

    asyncio.run(session())
    assert [length for length, _ in sent] == [3, 5, 3, 5]
    calls = [identity.pop("call") for _, identity in sent]
    assert calls[0] == calls[1] == 0 and calls[2] == calls[3] != 0
    assert all(identity == IDENTITY for _, identity in sent)


class Recorder:
    """An inner client that keeps what it was asked."""

    def __init__(self):
        self.asked = []
        self.tokenizer = "of the inner client"

    async def generate(self, request_id, **kwargs):
        self.asked.append((request_id, kwargs))
        return len(self.asked)


def test_the_sampling_parameters_of_a_loop_stay_its_own() -> None:
    inner = Recorder()
    client = SessionClient(inner, IDENTITY)
    params = {"temperature": 0.5, "extra_args": {"other": 1, "rl_accel": {"problem_id": "of the loop"}}}
    before = copy.deepcopy(params)
    assert asyncio.run(client.generate("r", prompt_ids=[1], sampling_params=params, image_data="i", priority=3)) == 1
    assert params == before
    (request_id, asked), *_ = inner.asked
    extra_args = asked.pop("sampling_params")["extra_args"]
    assert extra_args == {"other": 1, "rl_accel": {**IDENTITY, "call": 0}}
    assert (request_id, asked) == ("r", {"prompt_ids": [1], "image_data": "i", "priority": 3})


def test_a_client_can_be_asked_and_copied_like_the_inner_one() -> None:
    """Hydra copies what it hands to a loop whose configuration has more than a class."""
    client = copy.deepcopy(SessionClient(Recorder(), IDENTITY))
    assert client.tokenizer == "of the inner client"
    with pytest.raises(AttributeError):
        client.nothing_of_this_name  # noqa: B018
    assert asyncio.run(client.generate("r", prompt_ids=[1], sampling_params={})) == 1
