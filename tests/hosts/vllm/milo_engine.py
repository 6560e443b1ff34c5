"""Engines of test_milo_engine.py, in-process core, one after the other: `main()` is run by `run_ranks`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NUMBA_NUM_THREADS"] = "1"  # else ngram drafts change the number of OpenMP threads
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # of two ranks on one node
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"

import torch
from vllm import LLM, SamplingParams

NUM_REQUESTS, MAX_TOKENS = 12, 32
NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
SETTINGS: dict[str, dict | None] = {
    "stock": None,
    "plain": {},
    "ngram": {},
    "packed": {"mode": "packed"},
    "packed_ngram": {"mode": "packed"},
    "packed_all2": {"bits": 2, "linears": True, "mode": "packed"},
    "warm": {"refresh": "warm", "mode": "packed"},
    "bf16": {"mode": "packed"},
    "tp2": {"group_size": 32, "mode": "packed"},
    "unasked": {},
    "off": {"enable": False},
}
"""Mode -> settings of the feature, beside rank 4; None: not even its name."""
ENGINES: dict[str, dict] = {
    "ngram": {"speculative_config": NGRAM},
    "packed_ngram": {
        "speculative_config": NGRAM, "max_num_batched_tokens": 16, "max_num_seqs": 8, "enable_prefix_caching": False,
    },
    "bf16": {"dtype": "bfloat16"},
    "tp2": {"tensor_parallel_size": 2},
    "unasked": {"quantization": None},
}  # fmt: skip
RELOADED = ("plain", "packed", "packed_all2", "warm")
"""Modes that are sent other weights, and the first ones again."""


def prompt(index: int) -> list[int]:
    """Prompts of 40 to 100 tokens; four of a kind share all but their end."""
    return [(7 * (index // 4) + j * j) % 40 + 5 for j in range(40 + 5 * index)] + [index]


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
    llm.reset_prefix_cache()
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
    }


def engine(model: str, mode: str) -> LLM:
    moe = SETTINGS[mode]
    settings: dict = {"allow_lossy": True, "sampling": {"exact": True, "seed": 7}, "sync": {"readback": "every"}}
    if moe is not None:
        settings["moe"] = {"enable": True, "rank": 4, **moe}
        if mode == "warm":
            settings["moe"]["plan"] = str(Path(model).with_name("plan.json"))
    arguments = {
        "dtype": "float32",
        "max_model_len": 160,
        "max_num_seqs": NUM_REQUESTS,
        "max_num_batched_tokens": 512,
        "block_size": 32,
        "quantization": None if moe is None else "milo",
        **ENGINES.get(mode, {}),
    }
    return LLM(
        model,
        skip_tokenizer_init=True,
        enforce_eager=True,
        additional_config={"rl_accel": settings},
        disable_log_stats=False,
        **arguments,
    )


def _state(worker) -> dict:
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    runner = worker.model_runner
    experts = [module for module in runner.model.modules() if isinstance(module, RoutedExperts)]
    parameters = [dict(layer.named_parameters()) for layer in experts]
    stats = runner.rl_accel_spec_stats
    return {
        "live": dict(runner.rl_accel_live),
        "methods": [type(layer.quant_method).__name__ for layer in experts],
        "bytes": sum(p.nbytes for layer in parameters for p in layer.values()),
        "codes": [p.clone() for layer in parameters for name, p in layer.items() if p.dtype == torch.uint8],
        "storage": [p.data_ptr() for layer in parameters for p in layer.values()],
        "metrics": {name: role.drain() for name, role in runner.rl_accel.items()},
        "sync": runner.rl_accel["sync"].last_sync(),
        "counts": stats.drain() if stats else {},
    }


def _sync(worker, path: str) -> None:
    """New weights in three buckets, in the way in which they come from verl on a CPU."""
    from safetensors.torch import load_file
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    from rl_accel.hosts.vllm import packing

    runner = worker.model_runner
    weights = list(load_file(path).items())
    with set_current_vllm_config(runner.vllm_config), torch.no_grad(), packing.threads_of_load(runner):
        initialize_layerwise_reload(runner.model)
        for bucket in (weights[::3], weights[1::3], weights[2::3]):
            for role in runner.rl_accel.values():
                role.on_bucket(bucket)
            runner.model.load_weights(bucket)
        finalize_layerwise_reload(runner.model, runner.vllm_config.model_config)
    for role in runner.rl_accel.values():
        role.on_weights(runner, 0.0)


def run_engine(model: str, mode: str) -> dict:
    """Start one engine; returns what it sampled and what is in force, or why it refused."""
    from vllm.distributed import cleanup_dist_env_and_memory

    torch._C.set_num_threads(1)  # of all engines: they share oneDNN kernels (rl_accel/hosts/vllm/packing.py)
    try:
        llm = engine(model, mode)
    except Exception as error:  # of vLLM, of pydantic, or of rl_accel
        cleanup_dist_env_and_memory()
        return {"refused": str(error)}
    result: dict = {**generate(llm), "states": llm.collective_rpc(_state)}
    for name in ("moved", "back") if mode in RELOADED else ():
        path = f"{model}-moved" if name == "moved" else model
        llm.collective_rpc(_sync, args=(f"{path}/model.safetensors",))
        result[name] = {**generate(llm), "states": llm.collective_rpc(_state)}
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return result


def main() -> None:
    from rl_accel.hosts.vllm.plugin import register

    register()
    model, *modes = sys.argv[1:]
    torch.save({mode: run_engine(model, mode) for mode in modes}, os.environ["RESULT"])
