"""Exact sampling in a real vLLM engine: the tokens must not depend on batch size, order or speculation.

The engines run in subprocesses of this same file (`python test_exact_engine.py MODEL_DIR MODE OUT.json`),
in-process core, on a random 2-layer Qwen2 in float32. Two sets of requests: warm (temperature 1.0 with
top-p, top-k or both, and some greedy rows) and cold (temperature 0.05), where the random model repeats
itself and ngram drafts are accepted.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rl_accel.hosts.verl.session import SessionClient

VOCAB_SIZE = 300
NUM_REQUESTS = 48
MAX_TOKENS = 64
MODES = ("stock", "plain", "plain7", "plain_seed8", "ngram")
MASKS = [f"vllm.v1.worker.gpu_input_batch:InputBatch.{name}" for name in ("add_request", "swap_states")]
NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


def build_model(folder: Path) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = Qwen2ForCausalLM(config).to(torch.float32)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 0.02
    model.save_pretrained(folder)


def prompts() -> list[list[int]]:
    return [[(7 * i + j * j) % 40 + 5 for j in range(20 + i % 9)] for i in range(NUM_REQUESTS)]


def sampling_params(index: int, cold: bool):
    from vllm import SamplingParams

    filters = [{"top_p": 0.95}, {"top_k": 20}, {"top_p": 0.9, "top_k": 50}, {}][index % 4]
    greedy = index % 8 == 5
    return SamplingParams(
        temperature=0.0 if greedy else (0.05 if cold else 1.0),
        max_tokens=MAX_TOKENS,
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
        extra_args={
            "rl_accel": {
                "problem_id": f"p{index // 4}",
                "sample_index": index % 4,
                "step": 3,
                "validate": False,
            }
        },
        **({} if greedy else filters),
    )


def generate(llm, cold: bool, order: list[int]) -> dict:
    """Tokens and log-probs in the order of the requests, whatever the order of submission."""
    inputs = prompts()
    outputs = llm.generate(
        [{"prompt_token_ids": inputs[i]} for i in order],
        [sampling_params(i, cold) for i in order],
        use_tqdm=False,
    )
    tokens: list = [None] * NUM_REQUESTS
    logprobs: list = [None] * NUM_REQUESTS
    for index, output in zip(order, outputs, strict=True):
        completion = output.outputs[0]
        tokens[index] = list(completion.token_ids)
        logprobs[index] = [
            entry[token].logprob for entry, token in zip(completion.logprobs, completion.token_ids, strict=True)
        ]
    return {"tokens": tokens, "logprobs": logprobs}


def ask_ten_times(llm, backwards: bool) -> list[list[int]]:
    """What an agent loop gets that asks eight times for one prompt at temperature 1, then goes on with two texts.

    It asks in one order and waits in the same or the opposite one.
    """
    from vllm import SamplingParams

    class Client:
        """Stands for verl's client: sends what waits to this engine, in one batch."""

        def __init__(self):
            self.waiting: list = []

        async def generate(self, request_id, *, prompt_ids, sampling_params):
            text = asyncio.get_running_loop().create_future()
            self.waiting.append((prompt_ids, sampling_params, text))
            await asyncio.sleep(0)
            asked, self.waiting = self.waiting, []
            if asked:
                inputs = [{"prompt_token_ids": prompt} for prompt, _, _ in asked]
                params = [SamplingParams(max_tokens=12, ignore_eos=True, detokenize=False, **p) for _, p, _ in asked]
                for (*_, future), output in zip(asked, llm.generate(inputs, params, use_tqdm=False), strict=True):
                    future.set_result(list(output.outputs[0].token_ids))
            return await text

    async def session(client):
        async def all_of(prompts):
            calls = [
                client.generate("r", prompt_ids=p, sampling_params={"temperature": 1.0, "top_p": 0.95}) for p in prompts
            ]
            texts = await asyncio.gather(*(reversed(calls) if backwards else calls))
            return texts[::-1] if backwards else texts

        first = await all_of([prompts()[0]] * 8)
        return first + await all_of([prompts()[0] + text for text in first[:2]])

    identity = {"problem_id": "p0", "sample_index": 0, "step": 3, "validate": False}
    return asyncio.run(session(SessionClient(Client(), identity)))


def neighbor_of_masked(llm) -> dict:
    """Greedy tokens of a request alone, and in the row that one with `allowed_token_ids` has just left.

    Rows: 0 ends after a token, so 2 moves there; its row goes to the newcomer while row 1 keeps the mask in use.
    """
    from vllm import SamplingParams

    def params(length: int, allowed: list[int] | None = None):
        return SamplingParams(
            temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False, allowed_token_ids=allowed
        )

    engine, tokens = llm.llm_engine, {}
    alone = llm.generate([{"prompt_token_ids": prompts()[3]}], [params(8)], use_tqdm=False)[0].outputs[0].token_ids
    for name, wanted in (("short", params(1)), ("long", params(24, [7])), ("moves", params(24, [9]))):
        engine.add_request(name, {"prompt_token_ids": prompts()[0]}, wanted)
    for step in range(60):
        if step == 4:
            engine.add_request("newcomer", {"prompt_token_ids": prompts()[3]}, params(8))
        for output in engine.step():
            if output.finished:
                tokens[output.request_id] = list(output.outputs[0].token_ids)
    return {"alone": list(alone), **tokens}


def generate_malformed(llm) -> dict:
    """Requests whose identity cannot be read, and a good one among them that was sampled before."""
    from vllm import SamplingParams

    identities = [
        "x",
        1,
        [1, 2],
        {},
        {"problem_id": "p"},
        {**sampling_params(1, False).extra_args["rl_accel"], "step": "3"},
    ]
    malformed = [
        SamplingParams(max_tokens=6, seed=i, detokenize=False, extra_args={"rl_accel": identity})
        for i, identity in enumerate(identities)
    ]
    outputs = llm.generate(
        [{"prompt_token_ids": prompts()[1]}] * (len(malformed) + 1),
        [*malformed, sampling_params(1, False)],
        use_tqdm=False,
    )
    return {"finished": [o.outputs[0].finish_reason for o in outputs], "good": list(outputs[-1].outputs[0].token_ids)}


def generate_what_ends_stock_vllm(llm) -> dict:
    """Prompts with a seed that do not fit into one step, and `logprob_token_ids` beside log-probs and drafts."""
    from vllm import SamplingParams

    long = SamplingParams(max_tokens=4, seed=3, temperature=0.05, ignore_eos=True, detokenize=False)
    asking = SamplingParams(max_tokens=24, seed=3, temperature=0.05, logprob_token_ids=[5, 6], detokenize=False)
    prompt = [token for i in range(10) for token in prompts()[i]]
    inputs = [{"prompt_token_ids": prompt[i : i + 240]} for i in range(4)] + [{"prompt_token_ids": prompts()[1]}] * 2
    outputs = llm.generate(inputs, [*[long] * 4, asking, sampling_params(1, True)], use_tqdm=False)
    again = llm.generate(inputs[:1], [long], use_tqdm=False)
    return {
        "finished": [output.outputs[0].finish_reason for output in outputs],
        "alone": list(again[0].outputs[0].token_ids) == list(outputs[0].outputs[0].token_ids),
        "good": list(outputs[-1].outputs[0].token_ids),
    }


def model_runner(llm):
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def run_engine(model: str, mode: str) -> dict:
    """Start one engine and return what it sampled and what is live in it."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {"sampling": {"exact": True, "seed": 8 if mode == "plain_seed8" else 7}}
    llm = LLM(
        model,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=7 if mode == "plain7" else NUM_REQUESTS,
        max_num_batched_tokens=512,
        speculative_config=NGRAM if mode == "ngram" else None,
        additional_config={} if mode == "stock" else {"rl_accel": settings},
        disable_log_stats=False,
    )
    runner = model_runner(llm)
    result = {
        "sampler": type(runner.sampler).__module__ + "." + type(runner.sampler).__name__,
        "wrapped": [name for name in ("_sample", "_dummy_sampler_run") if name in vars(runner)],
        "live": getattr(runner, "rl_accel_live", None),
    }
    order = list(range(NUM_REQUESTS))
    if mode == "plain7":
        order = [(11 * i + 5) % NUM_REQUESTS for i in order]
    for cold in (False, True):
        result["cold" if cold else "warm"] = generate(llm, cold, order)
        stats = getattr(runner, "rl_accel_spec_stats", None)
        result["cold_stats" if cold else "warm_stats"] = stats and stats.drain()
    result["vllm"] = {
        metric.name: metric.value
        for metric in llm.get_metrics()
        if "spec_decode" in metric.name and hasattr(metric, "value")
    }
    result["session"] = [ask_ten_times(llm, backwards) for backwards in (False, True)]
    result["masked"] = neighbor_of_masked(llm)
    if mode != "stock":
        result["malformed"] = generate_malformed(llm)
        result["fatal"] = generate_what_ends_stock_vllm(llm)
    result["faults"] = getattr(runner, "rl_accel_faults", None) and runner.rl_accel_faults.counts
    llm.llm_engine.engine_core.shutdown()
    del llm, runner
    cleanup_dist_env_and_memory()
    return result


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Results of all engines by mode, each started once, one after another."""
    folder = tmp_path_factory.mktemp("exact")
    build_model(folder / "model")
    env = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    out = folder / "results.json"
    command = [sys.executable, __file__, str(folder / "model"), str(out), *MODES]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, json.loads(out.read_text())


def first_difference(a: list[list[int]], b: list[list[int]]) -> str:
    for request, (x, y) in enumerate(zip(a, b, strict=True)):
        for position, (s, t) in enumerate(zip(x, y, strict=True)):
            if s != t:
                return f"request {request} parts at output token {position}: {s} and {t}"
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


def main() -> None:
    from rl_accel.hosts.vllm.plugin import register

    register()
    model, out, *modes = sys.argv[1:]
    results = {mode: run_engine(model, mode) for mode in modes}
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
