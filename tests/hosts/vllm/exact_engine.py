"""Engines of test_exact_engine.py, in-process core, one after the other: `main()` is run by `run_ranks`.

Two sets of requests: warm (temperature 1.0 with top-p, top-k or both, and some greedy rows) and cold (temperature
0.05), where the random model repeats itself and ngram drafts are accepted.
"""

from __future__ import annotations

import asyncio
import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from exact_workload import MAX_TOKENS, NUM_REQUESTS, prompts
from vllm import LLM, SamplingParams

from rl_accel.hosts.verl.session import SessionClient

NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


def sampling_params(index: int, cold: bool):
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


def main() -> None:
    from rl_accel.hosts.vllm.plugin import register

    register()
    model, *modes = sys.argv[1:]
    torch.save({mode: run_engine(model, mode) for mode in modes}, os.environ["RESULT"])
