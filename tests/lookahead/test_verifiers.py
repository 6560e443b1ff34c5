"""Verifiers that ask a model: against transformers on the same weights, over real servers, and where these fail."""

from __future__ import annotations

import asyncio
import itertools
import random
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import httpx
import numpy as np
import pytest
import torch
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from rl_accel.errors import ConfigError, LookaheadError
from rl_accel.lookahead import serve, verify
from rl_accel.lookahead.core import Limits, Lookahead
from rl_accel.lookahead.endpoint import TokenEndpoint
from rl_accel.lookahead.hidden import Hidden
from rl_accel.lookahead.judge import Judge
from rl_accel.lookahead.likelihood import Likelihood, leaves_logprobs
from rl_accel.lookahead.proxy import Proxy, Settings
from rl_accel.lookahead.step import Step
from rl_accel.lookahead.switch import Switch
from rl_accel.lookahead.text import delimiter_ids
from rl_accel.lookahead.verifiers import LOSSLESS, VERIFIERS, check_verifier, for_sampling, make_verifier
from rl_accel.quickstart import problems
from rl_accel.quickstart.deep import POLICY

from .conftest import free_port, serving
from .loops import in_session, listening
from .models import HashModel, plain

TOKENIZER = AutoTokenizer.from_pretrained(POLICY)
DECODE = partial(TOKENIZER.decode, skip_special_tokens=True)
DELIMITERS = delimiter_ids(TOKENIZER, "\n")
END = TOKENIZER.eos_token_id
NOWHERE = "http://127.0.0.1:9"
NUM_PAIRS = 8


@pytest.fixture(scope="module")
def pooling(tmp_path_factory) -> Iterator[str]:
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(POLICY), "--port", str(port),
        "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "320", "--block-size", "32",
        "--max-num-seqs", "32", "--runner", "pooling", "--pooler-config.task", "token_embed",
    ]  # fmt: skip
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process less, 1.5 GB
    with serving(command, port, tmp_path_factory.mktemp("pooling") / "log", **env) as found:
        yield found


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32).eval()


def prompt_ids(number: int) -> tuple[int, ...]:
    messages = [{"role": "user", "content": PROBLEMS[number].question}]
    return tuple(TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])


PROBLEMS = problems.generate(NUM_PAIRS, seed=3)


def pairs_of(url: str, **sampling) -> list[tuple[tuple[int, ...], Step, Step]]:
    """Prefix and two steps of the policy after it, of other noise; at the start of an answer and after its first step.
    Where both happen to be the same one gets a token more."""

    async def run(session):
        def engine(number: int, noise: int) -> TokenEndpoint:
            identity = {"problem_id": f"{noise}/{number}", "sample_index": 0, "step": 0, "validate": False}
            given = {"temperature": 1.0, **sampling, "extra_args": {"rl_accel": identity}}
            return TokenEndpoint(session, url, given, delimiters=DELIMITERS, end_token_ids=[END])

        async def pair(number: int):
            prefix = prompt_ids(number)
            if number % 2:
                prefix += (await engine(number, 0).step(prefix, 60)).token_ids
            draft, own = await asyncio.gather(*(engine(number, noise).step(prefix, 60) for noise in (1, 2)))
            if draft.token_ids == own.token_ids:
                draft = Step((random.Random(number).randrange(256), *draft.token_ids))
            return prefix, draft, own

        return await asyncio.gather(*(pair(number) for number in range(NUM_PAIRS)))

    return in_session(run)


def log_prob(model, prefix, token_ids) -> float:
    with torch.no_grad():
        logprobs = model(torch.tensor([[*prefix, *token_ids]])).logits[0].log_softmax(-1)
    at = len(prefix) - 1
    return sum(logprobs[at + i, token].item() for i, token in enumerate(token_ids))


# Likelihood.


@pytest.mark.parametrize("sampling", [{"temperature": 1.0, "logprobs": 0}, {"temperature": 0.6, "logprobs": 0}, {}])
def test_likelihood_draws_the_line_where_transformers_does(url, model, sampling) -> None:
    """Margins a little above and a little below the true difference: with the step's own log-probs, with those that a
    temperature may have changed, and without any."""
    pairs = pairs_of(url, **sampling)
    gaps = [log_prob(model, prefix, own.token_ids) - log_prob(model, prefix, draft.token_ids)
            for prefix, draft, own in pairs]  # fmt: skip
    assert len({round(gap, 2) for gap in gaps}) > NUM_PAIRS / 2 and max(gaps) > 1

    async def run(session):
        async def agrees(pair, margin: float) -> tuple[bool, int]:
            verifier = Likelihood(session, url, {"temperature": 1.0, **sampling}, margin)
            found = await verifier.agree(*pair)
            assert verifier.cost.calls == 1 and verifier.cost.failures == 0 and verifier.cost.seconds > 0
            return found, verifier.cost.tokens

        for pair, gap in zip(pairs, gaps, strict=True):
            prefix, draft, own = pair
            tokens = len(prefix) + len(draft.token_ids)
            if sampling.get("temperature") != 1.0:
                tokens += len(prefix) + len(own.token_ids)
            assert await agrees(pair, gap + 0.005) == (True, tokens)
            assert await agrees(pair, gap - 0.005) == (False, tokens)

    in_session(run)


def test_own_log_probs_are_read_only_where_sampling_leaves_them(url) -> None:
    """A step that says of itself that it is very unlikely: any draft is likelier, if that is believed."""
    prefix, draft, own = pairs_of(url)[0]
    draft = Step((*range(10, 20), *draft.token_ids))
    modest = Step(own.token_ids, logprobs=(-1000.0,) * len(own.token_ids))
    short = Step(own.token_ids, logprobs=(-1000.0,))

    async def run(session):
        verifier = Likelihood(session, url, {"temperature": 1.0})
        other = verifier.with_sampling({"temperature": 0.6})
        found = [await v.agree(prefix, draft, o) for v, o in ((verifier, modest), (other, modest), (verifier, short))]
        assert other.cost is verifier.cost and verifier.cost.calls == 3
        return found

    assert in_session(run) == [True, False, False]


@given(
    st.dictionaries(
        st.sampled_from(["temperature", "top_p", "top_k", "min_p", "presence_penalty", "repetition_penalty"]),
        st.sampled_from([None, 0, 1, -1, 0.5]),
    )
)
def test_parameters_that_leave_log_probs(sampling) -> None:
    neutral = {"temperature": (0, 1), "top_p": (1,), "top_k": (0, -1), "min_p": (0,), "presence_penalty": (0,),
               "repetition_penalty": (1,)}  # fmt: skip
    expected = all(value is None or value in neutral[name] for name, value in sampling.items())
    assert leaves_logprobs(sampling) == expected
    assert leaves_logprobs({**sampling, "logprobs": 0, "ignore_eos": False, "bad_words": []}) == expected
    assert not leaves_logprobs({**sampling, "logit_bias": {"3": 1.0}})


# Hidden states.


def test_hidden_states_are_those_of_transformers(url, pooling, model) -> None:
    pairs = pairs_of(url)

    def mean_of(prefix, token_ids) -> np.ndarray:
        with torch.no_grad():
            states = model.model(torch.tensor([[*prefix, *token_ids]])).last_hidden_state[0]
        return states[len(prefix) :].double().mean(0).numpy()

    async def run(session):
        cosines = []
        for prefix, draft, own in pairs:
            expected = [mean_of(prefix, step.token_ids) for step in (draft, own)]
            verifier = Hidden(session, pooling)
            found = await verifier.mean_states(prefix, [draft.token_ids, own.token_ids])
            for a, b in zip(found, expected, strict=True):
                assert a.shape == (model.config.hidden_size,)
                assert np.abs(a - b).max() < 2**-8 * np.abs(b).max(), "bfloat16 rounds by 2^-9 at most"
            assert verifier.cost.tokens == 2 * len(prefix) + len(draft.token_ids) + len(own.token_ids)
            a, b = expected
            cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
            cosines.append(cosine)
            for threshold, agrees in ((cosine - 3e-4, True), (cosine + 3e-4, False)):
                verifier = Hidden(session, pooling, threshold)
                assert await verifier.agree(prefix, draft, own) is agrees
                assert verifier.cost.calls == 1 and verifier.cost.failures == 0
        return cosines

    cosines = in_session(run)
    assert min(cosines) < 0.99


def test_what_is_no_pooling_server_agrees_to_nothing(url, pooling, caplog) -> None:
    prefix, draft, own = pairs_of(url)[0]

    async def run(session):
        for where, model_name, reason in ((url, None, "404"), (pooling, "other", "404"), (NOWHERE, None, "connect")):
            caplog.clear()
            verifier = Hidden(session, where, -1.0, model=model_name)
            assert not await verifier.agree(prefix, draft, own)
            assert (verifier.cost.calls, verifier.cost.failures) == (1, 1)
            assert reason in caplog.text
        with pytest.raises(LookaheadError, match="answers 400"):
            await Hidden(session, pooling).mean_states(prefix, [range(320)])

    in_session(run)


STATES = (
    '{"data": [{"index": 0, "start": 0, "end": %d, "shape": [%d, 2]}, '
    '{"index": 1, "start": 0, "end": 8, "shape": [2, 2]}]}'
)


@pytest.mark.parametrize(
    ("metadata", "body"),
    [
        ("", b""), ("[]", b""), ('{"data": 3}', b""), ('{"data": []}', b""), (STATES % (12, 3), b"\0" * 12),
        (STATES % (8, 2), b"\0" * 3), (STATES % (8, 2), b"\0" * 8), (STATES % (8, 2), b"\x80\x7f" * 4),
        (STATES % (8, 2), b"\xc0\x7f" * 4),
    ],
)  # fmt: skip
def test_states_that_are_none_agree_to_nothing(metadata, body) -> None:
    """No metadata, other shapes, too few bytes; zeros, infinities and NaN."""

    async def answer(request):
        return web.Response(body=body, headers={"metadata": metadata})

    async def run(session):
        async with listening(answer) as where:
            verifier = Hidden(session, where, -1.0)
            assert not await verifier.agree((1,), Step((2,)), Step((3,)))
            assert verifier.cost.failures == 1

    in_session(run)


# All of them.


def test_the_same_tokens_agree_unasked() -> None:
    async def run(session):
        for found in (
            Likelihood(session, NOWHERE, {}),
            Hidden(session, NOWHERE),
            Judge(session, NOWHERE, None, DECODE),
        ):
            assert await found.agree((1, 2), Step((3, 4)), Step((3, 4)))
            assert found.cost.calls == 0 and not found.lossless

    in_session(run)


def test_a_text_is_the_targets_own_where_the_verifier_is_gone() -> None:
    seed = next(s for s in itertools.count() if len(plain(HashModel(s), (1, 2), 60)) == 60)
    target, draft = HashModel(seed, seconds=1e-3), HashModel(seed, wrong=0.2, seconds=1e-4)

    async def run(session):
        found = Judge(session, NOWHERE, None, str)
        steps = Lookahead(target, draft, found, Limits(60), lambda: 4).steps((1, 2))
        return [token async for final in steps for token in final.step.token_ids], found.cost

    token_ids, cost = in_session(run)
    assert token_ids == plain(target, (1, 2), 60) and cost.failures == cost.calls > 0


def test_settings_that_cannot_work_are_named() -> None:
    for name in VERIFIERS:
        check_verifier(name, "http://x" if name in ("hidden", "judge") else None, None)
    for arguments, message in (
        (("exakt", None, None), "Did you mean 'exact'"), (("hidden", None, None), "set verifier_url"),
        (("judge", "", None), "set verifier_url"), (("judge", "localhost:8000", None), "must begin with http"),
        (("exact", "http://x", None), "asks no server"), (("likelihood", "http://x", None), "asks no server"),
        (("exact", None, 0.5), "has no threshold"), (("judge", "http://x", 0.5), "has no threshold"),
        (("random", None, 1.5), "probability, 0 to 1"), (("hidden", "http://x", 1.1), "cosine, -1 to 1"),
        (("likelihood", None, -0.1), "nats"), (("random", None, float("nan")), "probability"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            check_verifier(*arguments)
        with pytest.raises(ConfigError, match=message):
            make_verifier(arguments[0], session=None, target_url="http://t", sampling={}, decode=DECODE,
                          verifier_url=arguments[1], threshold=arguments[2])  # fmt: skip


def test_settings_are_checked_without_a_client() -> None:
    program = (
        "import sys; from rl_accel.lookahead.verifiers import check_verifier; check_verifier('judge', 'http://x', None)"
    )
    subprocess.run(
        [sys.executable, "-c", f"{program}; assert not {{'aiohttp', 'torch'}} & set(sys.modules)"], check=True
    )


def test_verifiers_by_name() -> None:
    kinds = {"exact": verify.Exact, "numbers": verify.Numbers, "likelihood": Likelihood, "hidden": Hidden,
             "judge": Judge, "random": verify.Random, "always": verify.Always}  # fmt: skip
    assert tuple(kinds) == VERIFIERS
    thresholds = {"likelihood": ("margin", 1.0), "hidden": ("threshold", 0.99), "random": ("probability", 0.5)}

    async def run(session):
        for name, kind in kinds.items():
            where = "http://v" if name in ("hidden", "judge") else None
            make = partial(make_verifier, name, session=session, target_url="http://t", sampling={"top_p": 0.5},
                           decode=DECODE, verifier_url=where, verifier_model="m", api_key="k")  # fmt: skip
            found = make()
            assert type(found) is kind and found.lossless == (name in LOSSLESS)
            assert (for_sampling(found, {}) is found) == (name != "likelihood")
            assert hasattr(found, "cost") == (name in ("likelihood", "hidden", "judge"))
            if name in thresholds:
                attribute, default = thresholds[name]
                assert getattr(found, attribute) == default and getattr(make(threshold=0.25), attribute) == 0.25

    in_session(run)


def test_the_command_names_what_is_missing(capsys) -> None:
    base = ["--target", "http://x", "--draft", "http://y", "--tokenizer", "quickstart", "--verifier"]
    for options, message in (
        (["hidden", "--allow-lossy"], "--verifier-url"), (["judge", "--verifier-url", "http://z"], "--allow-lossy"),
        (["random", "--threshold", "2", "--allow-lossy"], "probability"),
    ):  # fmt: skip
        assert serve.main([*base, *options]) == 2
        assert message in capsys.readouterr().err


def test_the_proxy_shows_what_a_verifier_costs(url) -> None:
    """A draft server that says the same at once to everything: taken at a margin of 1e9 nats, never at one of -1e9."""
    said = [*TOKENIZER("so it is 17")["input_ids"], TOKENIZER("\n")["input_ids"][-1]]
    assert said[-1] in DELIMITERS

    async def always_the_same(request: web.Request) -> web.Response:
        body = await request.json()
        assert "logprobs" not in body["sampling_params"], "the target is asked for them, the draft is not"
        return web.json_response({"choices": [{"token_ids": said, "finish_reason": "stop"}]})

    async def asked(draft: str, make) -> tuple[dict[str, float], list[str]]:
        settings = Settings(url, draft, "policy", tuple(DELIMITERS), (END,), max_tokens=70)
        app = Proxy(settings, TOKENIZER, make, Switch(3, always=True)).app()
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy", timeout=120) as client,
        ):
            texts = []
            for number in range(3):
                messages = [{"role": "user", "content": PROBLEMS[number].question}]
                answer = await client.post("/v1/chat/completions", json={"messages": messages, "seed": number})
                assert answer.status_code == 200, answer.text
                texts.append(answer.json()["choices"][0]["message"]["content"])
            lines = (await client.get("/metrics")).text.splitlines()
        return {name: float(value) for name, value in (line.split() for line in lines if line[0] != "#")}, texts

    async def run(session):
        async with listening(always_the_same) as draft:
            make = partial(make_verifier, target_url=url, sampling={}, decode=DECODE)
            return {
                "exact": await asked(draft, partial(make, "exact")),
                "all": await asked(draft, partial(make, "likelihood", threshold=1e9)),
                "none": await asked(draft, lambda session: Likelihood(session, url, {}, -1e9)),
            }

    found = in_session(run)
    prefix = "rl_accel_lookahead_verifier_"
    assert not [name for name in found["exact"][0] if name.startswith(prefix)]
    for way in ("all", "none"):
        metrics = found[way][0]
        assert metrics[f"{prefix}calls_total"] >= 3 and metrics[f"{prefix}failures_total"] == 0
        assert metrics[f"{prefix}seconds_total"] > 0
        assert metrics[f"{prefix}tokens_total"] > 30 * metrics[f"{prefix}calls_total"]
    assert found["none"][1] == found["exact"][1] and "so it is 17" in "".join(found["all"][1])
    name = "rl_accel_lookahead_draft_steps_total"
    assert found["all"][0][name] > found["none"][0][name] == 0
