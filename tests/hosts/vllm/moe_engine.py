"""Engines of test_moe_engine.py, in-process core, one after the other: `main()` is run by `run_ranks`.

New weights come as verl's do: out of a `BucketedWeightSender`, in buckets of 1 MiB, into the worker extension.
"""

from __future__ import annotations

import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NUMBA_NUM_THREADS"] = "1"  # else ngram drafts change the number of OpenMP threads, at a time of their own
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
os.environ["VERL_PLATFORM"] = "cpu"
os.environ["VERL_RAY_JOB_ID"] = f"moe-{os.getpid()}"

import asyncio
import gc
import threading
from pathlib import Path

import torch
from tiny_moe import PROMPTS, exported_names, trained_weights
from vllm import LLM, SamplingParams

EXTENSION = "rl_accel.hosts.verl.worker_extension.AcceleratedWorkerExtension"
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
HANDLE = f"ipc:///tmp/rl-colocate-zmq-{os.environ['VERL_RAY_JOB_ID']}-replica-0-rank-0.sock"


def engine(model: str, dtype: str, drafts: bool) -> LLM:
    return LLM(
        model,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype=dtype,
        max_model_len=128,
        max_num_seqs=8,
        max_num_batched_tokens=512,
        block_size=32,
        worker_extension_cls=EXTENSION,
        additional_config={"rl_accel": {"sampling": {"exact": True, "seed": 3}, "sync": {"readback": "every"}}},
        speculative_config=NGRAM if drafts else None,
    )


def generate(llm: LLM) -> dict:
    """Log-probs of the prompts, and tokens: greedy for the first half, sampled cold for the others."""
    params = [
        SamplingParams(
            temperature=0.0 if i < len(PROMPTS) // 2 else 0.3,
            max_tokens=40,
            ignore_eos=True,
            detokenize=False,
            prompt_logprobs=0,
            extra_args={"rl_accel": {"problem_id": f"p{i}", "sample_index": 0, "step": 1, "validate": False}},
        )
        for i in range(len(PROMPTS))
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "prompt_logprobs": [
            [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
            for output, prompt in zip(outputs, PROMPTS, strict=True)
        ],
    }


def sync(llm: LLM, weights) -> dict:
    """Send weights as a trainer does; returns what the engine says of it, or how it failed."""
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    def send() -> None:
        sender = BucketedWeightSender(HANDLE, bucket_size_mb=1, use_shm=True)
        asyncio.run(sender.async_send_weights(iter(weights)))

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    try:
        llm.collective_rpc("update_weights_from_ipc", kwargs={"use_shm": True})
    except Exception as error:
        return {"failed": str(error)}
    finally:
        thread.join(30)
    llm.reset_prefix_cache()
    return llm.collective_rpc("rl_accel_call", args=("sync", "last_sync", ()))[0]


def _experts(worker) -> list:
    return [module for module in worker.model_runner.model.modules() if type(module).__name__ == "RoutedExperts"]


def _swap_experts(worker) -> None:
    """Exchange two experts of the last layer behind the engine's back."""
    weight = _experts(worker)[-1].w13_weight.data
    weight[[1, 5]] = weight[[5, 1]]


def readback(worker, weights: list) -> tuple[float, str]:
    from rl_accel.hosts.vllm.weight_names import for_engine
    from rl_accel.weight_sync.readback import SentSample, readback_error

    model, sent = worker.model_runner.model, SentSample()
    sent.add(for_engine(model, weights))
    return readback_error(model, sent)


def _expecting(worker, weights: list) -> dict:
    """Read back with a feature that wants one expert otherwise, then with layers that say what they use themselves."""
    from rl_accel.hosts.vllm.weight_names import for_engine
    from rl_accel.weight_sync.experts import sent_experts
    from rl_accel.weight_sync.readback import SentSample, readback_error

    model, sent, seen = worker.model_runner.model, SentSample(), {}
    sent.add(for_engine(model, weights))

    def expectation(name: str, weight: torch.Tensor) -> torch.Tensor:
        if not name.endswith((".w13", ".w2")):
            return weight
        seen[name] = tuple(weight.shape)
        changed = weight.clone()
        changed[3] *= 1.5
        return changed

    found = {"names": seen, "other": readback_error(model, sent, [expectation])}
    for layer in _experts(worker):
        plain = sent_experts(layer, sent.tensors)
        layer.rl_accel_used_weight = lambda which, plain=plain: plain[which].float()
    found["own"] = readback_error(model, sent)
    layer.rl_accel_used_weight = lambda which, plain=plain: plain[which].float() + 0.25
    found["own_wrong"] = readback_error(model, sent)
    for layer in _experts(worker):
        del layer.rl_accel_used_weight
    return found


def run_engine(root: Path, kind: str, dtype: str, mode: str) -> dict:
    """Start one engine, sync other weights twice, and damage what it holds."""
    from vllm.distributed import cleanup_dist_env_and_memory

    from rl_accel.hosts.vllm import moe_repair

    patches, moe_repair.PATCHES = moe_repair.PATCHES, () if mode == "unrepaired" else moe_repair.PATCHES
    first, other = (str(root / f"{kind}-{seed}-{dtype}") for seed in (0, 1))
    llm = engine(first, dtype, drafts=mode != "plain")
    result = {"first": generate(llm), "live": llm.collective_rpc("rl_accel_live")[0]}
    if mode == "drafts":
        weights = list(trained_weights(other, getattr(torch, dtype)))
        # What linear layers are packed with must be what they were packed with first (`packing.py`).
        torch._C.set_num_threads(2)
        result["sent_names"] = [name for name, _ in weights]
        result["exported_names"] = exported_names(other)
        result["synced"] = sync(llm, weights)
        torch._C.set_num_threads(1)
        result["other"] = generate(llm)
        result["accepted"] = llm.collective_rpc("rl_accel_drain")[0]["counts"]["num_accepted_tokens"]
        if dtype == "float32":
            fused = list(trained_weights(first, torch.float32, fused=True))
            result["fused_synced"] = sync(llm, fused)
            result["again"] = generate(llm)
            result["readback"] = llm.collective_rpc(readback, args=(fused,))[0]
            result["expecting"] = llm.collective_rpc(_expecting, args=(fused,))[0]
            llm.collective_rpc(_swap_experts)
            result["swapped"] = llm.collective_rpc(readback, args=(fused,))[0]
    if mode == "unrepaired":
        result["synced"] = sync(llm, list(trained_weights(other, torch.float32)))
        result["other"] = generate(llm)
    moe_repair.PATCHES = patches
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return result


def main() -> None:
    from rl_accel.hosts.vllm.plugin import register

    register()
    torch.set_num_threads(1)
    gc.freeze()  # vLLM collects at every start and end of an engine, and verl's modules are many
    gc.unfreeze = lambda: None
    root, *modes = sys.argv[1:]
    results = {}
    for name in modes:
        kind, dtype, mode = name.split("/")
        results[name] = run_engine(Path(root), kind, dtype, mode)
    torch.save(results, os.environ["RESULT"])
