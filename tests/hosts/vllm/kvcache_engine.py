"""Engines of test_kvcache_engine.py, in-process core, one after the other: `main()` is run by `run_ranks`.

Requests share long prefixes, cross tiles of 128 tokens, and are cold enough for ngram drafts to be accepted.
"""

from __future__ import annotations

import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # of two ranks on one node
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"

import torch
from vllm import LLM, SamplingParams

NUM_REQUESTS, MAX_TOKENS = 24, 40
NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
OURS = {"kv_cache_dtype": "int4_per_token_head", "kv_cache_dtype_skip_layers": ["0"]}
DAS = {"model": "rl_accel.draft.hosts.proposer.DASProposer", "num_speculative_tokens": 8}
ENGINES: dict[str, dict] = {
    "das": {"speculative_config": DAS},
    "chunks": {"max_num_batched_tokens": 16, "max_num_seqs": 8, "enable_prefix_caching": False, "block_size": 64},
    "preempt": {"num_gpu_blocks_override": 40},
    "bf16": {"dtype": "bfloat16"},
    "bf16_ngram": {"dtype": "bfloat16", "speculative_config": NGRAM},
    "tp2": {"tensor_parallel_size": 2},
}
"""Mode -> arguments of the engine that differ."""
SETTINGS: dict[str, dict] = {
    "all4": {"int8_layers": 0},
    "options": {"rotate_v": True, "shift": True, "order": 8},
    "wide": {"int8_layers": 0},
}
"""Mode -> settings of the feature that differ."""


def prompt(index: int) -> list[int]:
    """Prompts of 70 to 185 tokens; four of a kind share all but their end."""
    return [(7 * (index // 4) + j * j) % 40 + 5 for j in range(70 + 5 * index)] + [index]


def params(index: int) -> SamplingParams:
    identity = {"problem_id": f"p{index // 4}", "sample_index": index % 4, "step": 3, "validate": False}
    return SamplingParams(
        temperature=0.05 if index % 2 else 1.0,
        max_tokens=MAX_TOKENS,
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
        extra_args={"rl_accel": identity},
    )


def generate(llm) -> dict:
    """Tokens and their log-probs."""
    outputs = llm.generate(
        [{"prompt_token_ids": prompt(i)} for i in range(NUM_REQUESTS)],
        [params(i) for i in range(NUM_REQUESTS)],
        use_tqdm=False,
    )
    found = [output.outputs[0] for output in outputs]
    return {
        "tokens": [list(out.token_ids) for out in found],
        "logprobs": [
            [entry[token].logprob for entry, token in zip(out.logprobs, out.token_ids, strict=True)] for out in found
        ],
        "cached": sum(output.num_cached_tokens or 0 for output in outputs),
    }


def engine(model: str, mode: str) -> LLM:
    stock = mode.startswith(("stock", "unasked"))
    settings = {"allow_lossy": True, "sampling": {"exact": True, "seed": 7}}
    if mode not in ("stock", "stock_after", "stock_wide"):
        settings["kvcache"] = {"enable": True, **SETTINGS.get(mode, {})}
    layers = [] if SETTINGS.get(mode, {}).get("int8_layers") == 0 else ["0"]
    arguments = {
        "dtype": "bfloat16" if "wide" in mode else "float32",
        "max_model_len": 256,
        "max_num_seqs": NUM_REQUESTS,
        "max_num_batched_tokens": 512,
        "block_size": 32,
        **({} if stock else {**OURS, "kv_cache_dtype_skip_layers": layers}),
        **ENGINES.get(mode, {}),
    }
    if mode == "draft_model":
        arguments["speculative_config"] = {"method": "draft_model", "model": model, "num_speculative_tokens": 3}
    return LLM(
        f"{model}-wide" if "wide" in mode else f"{model}-moved" if mode == "moved" else model,
        skip_tokenizer_init=True,
        enforce_eager=True,
        additional_config={"rl_accel": settings},
        disable_log_stats=False,
        **arguments,
    )


def _state(worker) -> dict:
    runner = worker.model_runner
    context = runner.compilation_config.static_forward_context
    role = runner.rl_accel.get("kvcache")
    return {
        "live": dict(runner.rl_accel_live),
        "impls": [type(layer.impl).__name__ for layer in context.values()],
        "caches": [(layer.kv_cache.dtype, tuple(layer.kv_cache.shape)) for layer in context.values()],
        "blocks": runner.kv_cache_config.num_blocks,
        "metrics": role.drain() if role else {},
        "counts": runner.rl_accel_spec_stats.drain() if runner.rl_accel_spec_stats else {},
    }


def _sync(worker, path: str) -> None:
    """New weights, in the way in which they come from verl on a CPU."""
    from safetensors.torch import load_file
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    runner = worker.model_runner
    with set_current_vllm_config(runner.vllm_config), torch.no_grad():
        initialize_layerwise_reload(runner.model)
        runner.model.load_weights(load_file(path).items())
        finalize_layerwise_reload(runner.model, runner.vllm_config.model_config)
    for role in runner.rl_accel.values():
        role.on_weights(runner, 0.0)


def run_engine(model: str, mode: str) -> dict:
    """Start one engine; returns what it sampled and what is in force, or why it refused."""
    from vllm.distributed import cleanup_dist_env_and_memory

    from rl_accel.errors import RLAccelError

    # Every engine: those before leave the number of numba, and torch.set_num_threads replaced by nothing.
    torch._C.set_num_threads(1 if mode == "preempt" else 2)
    try:
        llm = engine(model, mode)
    except (RLAccelError, RuntimeError) as error:
        cleanup_dist_env_and_memory()
        return {"refused": str(error)}
    states = llm.collective_rpc(_state)
    result = {"state": states[0], "states": states, "threads": torch.get_num_threads()}
    if "wide" not in mode:
        result |= generate(llm)
        result["after"] = llm.collective_rpc(_state)[0]
    if mode == "plain":
        llm.collective_rpc(_sync, args=(f"{model}-moved/model.safetensors",))
        llm.reset_prefix_cache()
        result["moved"] = {**generate(llm), "state": llm.collective_rpc(_state)[0]}
    result["preemptions"] = sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return result


def main() -> None:
    from rl_accel.hosts.vllm.plugin import register

    register()
    model, *modes = sys.argv[1:]
    torch.save({mode: run_engine(model, mode) for mode in modes}, os.environ["RESULT"])
