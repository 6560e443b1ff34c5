"""Exact sampling in a real vLLM engine: the tokens must not depend on batch size, order or speculation.

The engines: `exact_engine.py`, on a random 2-layer Qwen2 in float32.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from .exact_workload import NUM_REQUESTS, prompts
from .tiny_qwen import build_model

ENGINE = Path(__file__).with_name("exact_engine.py")
MODES = ("stock", "plain", "plain7", "plain_seed8", "ngram")
MASKS = [f"vllm.v1.worker.gpu_input_batch:InputBatch.{name}" for name in ("add_request", "swap_states")]


@pytest.fixture(scope="module")
def engines(run_ranks, tmp_path_factory):
    """Folder of the model, and results of all engines by mode, each started once."""
    folder = tmp_path_factory.mktemp("exact")
    build_model(folder / "model")
    (results,) = run_ranks(ENGINE, 1, str(folder / "model"), *MODES, timeout=400)
    return folder, results


def first_difference(a: list[list[int]], b: list[list[int]]) -> str:
    for request, (x, y) in enumerate(zip(a, b, strict=True)):
        for position, (s, t) in enumerate(zip(x, y, strict=True)):
            if s != t:
                return f"request {request} diverges at output token {position}: {s} and {t}"
    return ""


@pytest.mark.parametrize("which", ["warm", "cold"])
@pytest.mark.parametrize("mode", ["plain7", "ngram"])
def test_same_tokens_for_any_batch_order_and_drafts(engines, mode, which):
    _, results = engines
    assert first_difference(results["plain"][which]["tokens"], results[mode][which]["tokens"]) == ""


def test_drafts_were_accepted(engines):
    """Else the comparison above would say nothing about verification."""
    _, results = engines
    stats = results["ngram"]["cold_stats"]
    assert stats["num_accepted_tokens"] > 100
    assert (
        results["ngram"]["warm_stats"]["num_draft_tokens"] > results["ngram"]["warm_stats"]["num_accepted_tokens"] > 0
    )


def test_counter_agrees_with_vllm(engines):
    """vLLM's scheduler counts the same drafts on its own."""
    _, results = engines
    ours = results["ngram"]
    for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
        assert ours["cold_stats"][name] + ours["warm_stats"][name] == ours["vllm"][f"vllm:spec_decode_{name}"], name


def test_seed_changes_the_tokens_except_of_greedy_rows(engines):
    _, results = engines
    a, b = results["plain"]["warm"]["tokens"], results["plain_seed8"]["warm"]["tokens"]
    same = [i for i in range(NUM_REQUESTS) if a[i] == b[i]]
    assert same == [i for i in range(NUM_REQUESTS) if i % 8 == 5]


@pytest.mark.parametrize("mode", ["plain", "ngram"])
def test_logprobs_and_greedy_tokens_equal_a_rescore(engines, mode):
    """`logprobs_mode` is vLLM's default, raw_logprobs: of the unprocessed logits."""
    import torch
    from transformers import AutoModelForCausalLM

    folder, results = engines
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    for which in ("warm", "cold"):
        run = results[mode][which]
        for index, prompt in enumerate(prompts()):
            tokens = torch.tensor(run["tokens"][index])
            with torch.no_grad():
                logits = model(torch.tensor([prompt + run["tokens"][index]])).logits[0]
            distribution = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
            expected = distribution.gather(1, tokens[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(run["logprobs"][index]), expected, atol=1e-4, rtol=0)
            if index % 8 == 5:
                gap = distribution.max(dim=-1).values - expected
                assert float(gap.max()) < 1e-4


@pytest.mark.parametrize("mode", ["plain", "ngram"])
def test_generations_of_a_session_are_independent_and_repeat(engines, mode):
    """The first is that of a session of one generation. Without numbers, all eight of one prompt are one text."""
    _, results = engines
    forwards, backwards = results[mode]["session"]
    assert forwards == backwards == results["plain"]["session"][0]
    assert len({tuple(text) for text in forwards}) == 10
    assert forwards[0] == results["plain"]["warm"]["tokens"][0][:12]


@pytest.mark.parametrize("mode", ["plain", "ngram"])
def test_a_request_keeps_its_own_allowed_tokens(engines, mode):
    """Stock vLLM, as the control, lets the newcomer sample from the tokens of the request that had its row."""
    _, results = engines
    assert results["stock"]["masked"]["newcomer"] != results["stock"]["masked"]["alone"]
    masked = results[mode]["masked"]
    assert masked["newcomer"] == masked["alone"] == results["stock"]["masked"]["alone"]
    assert set(masked["long"]) == {7} and set(masked["moves"]) == {9}


@pytest.mark.parametrize("mode", ["plain", "ngram"])
def test_malformed_identities_harm_nobody(engines, mode):
    _, results = engines
    assert results[mode]["malformed"]["finished"] == ["length"] * 7
    assert results[mode]["malformed"]["good"] == results["plain"]["warm"]["tokens"][1]
    assert results[mode]["faults"]["malformed_identities"] == 6


@pytest.mark.parametrize("mode", ["plain", "ngram"])
def test_requests_that_end_stock_vllm_harm_nobody(engines, mode):
    """Stock vLLM 0.28.0 ends with `CPU Generator does not use offset` and with a shape mismatch in its sampler."""
    _, results = engines
    fatal = results[mode]["fatal"]
    assert set(fatal["finished"]) <= {"length", "stop"} and fatal["alone"]
    assert fatal["good"] == results["plain"]["cold"]["tokens"][1]


def test_off_means_off_and_on_means_live(engines):
    _, results = engines
    assert results["stock"]["sampler"] == "vllm.v1.sample.sampler.Sampler"
    assert results["stock"]["live"] is None and results["stock"]["wrapped"] == []
    assert results["plain"]["live"] == {
        "model_runner": "V1",
        "repairs": [*MASKS, "vllm.v1.worker.gpu_model_runner:GPUModelRunner._bookkeeping_sync"],
        "self_test": "not needed",
        "features": {"sampling": True, "sync": True},
    }
    ngram = results["ngram"]["live"]
    assert ngram["features"] == {"sampling": True, "sync": True} and ngram["self_test"] == "passed"
    assert ngram["repairs"][0] == "vllm.v1.sample.rejection_sampler:expand_batch_to_tokens"
    assert ngram["repairs"][-1] == "vllm.v1.sample.rejection_sampler:RejectionSampler.forward"
