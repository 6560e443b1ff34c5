"""What low-bit experts bring in a vLLM engine, where they are beyond cache and where they are not.

    python scripts/bench_moe_engine.py [--part wide tiny] [--rounds 5] [--threads 2] [--json FILE]

Every arm is an engine in a process of its own that waits while others are timed; arms take turns by rounds.

    moe.engine_step_ms.b<batch>.<arm>    a decoding step of a random Qwen3-MoE in bfloat16: 2 layers of 32 experts, of
                                         which 8 are taken, hidden 2,048, 768 neurons (600 MB); incumbent: stock bf16
    moe.engine_load_s.<arm>              loading it, quantization included
    moe.tiny_step_ms.b<batch>.<arm>      of the shipped mixture-of-experts policy in float32; incumbent: stock float32

Arms: `materialized.r<rank>`, `packed.r<rank>`, 3 bits. Values are medians of rounds, `spread` their range as a share;
`bytes` of the experts as the engine holds them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench_kv_engine import steps_of

from rl_accel import machine
from rl_accel.hosts import versions

BATCHES = (1, 8, 32)
CONTEXT, VOCABULARY = 32, 400
ARMS = {
    "wide": ("stock", "materialized.r16", "packed.r0", "packed.r16", "packed.r32"),
    "tiny": ("stock", "materialized.r16", "packed.r16"),
}


def build_random(folder: Path) -> None:
    """Write the wide policy to a folder."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=2048, hidden_size=2048, intermediate_size=768, moe_intermediate_size=768, num_hidden_layers=2,
        num_attention_heads=16, num_key_value_heads=2, head_dim=128, num_experts=32, num_experts_per_tok=8,
        norm_topk_prob=True, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)


def engine_of(part: str, arm: str, model: str, threads: int) -> Any:
    """Return an engine of this process."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    }  # fmt: skip
    import torch
    from vllm import LLM

    settings: dict[str, Any] = {"sampling": {"exact": True, "seed": 0}}
    args: dict[str, Any] = {"dtype": "bfloat16" if part == "wide" else "float32"}
    if arm != "stock":
        mode, rank = arm.split(".r")
        settings |= {"allow_lossy": True, "moe": {"enable": True, "mode": mode, "rank": int(rank), "alternations": 2}}
        args["quantization"] = "milo"
    torch.set_num_threads(threads)
    return LLM(
        model, enforce_eager=True, seed=0, max_model_len=256, max_num_seqs=64, block_size=32, skip_tokenizer_init=True,
        kv_cache_memory_bytes=256 << 20, enable_prefix_caching=False, additional_config={"rl_accel": settings}, **args,
    )  # fmt: skip


def _expert_bytes(worker: Any) -> int:
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    layers = [module for module in worker.model_runner.model.modules() if isinstance(module, RoutedExperts)]
    return sum(parameter.nbytes for layer in layers for parameter in layer.parameters())


def sampling(number: int) -> dict[str, Any]:
    """Of one request: hot, so that noise decides, the same in every arm. Greedy arms write different texts, and
    where one repeats a token, its experts stay in the cache."""
    identity = {"problem_id": f"p{number}", "sample_index": 0, "step": 0, "validate": False}
    return {"temperature": 2.0, "extra_args": {"rl_accel": identity}}


def serve(part: str, arm: str, model: str, threads: int, pipe: Any) -> None:
    started = time.perf_counter()
    llm = engine_of(part, arm, model, threads)
    pipe.send({"load": time.perf_counter() - started, "bytes": llm.collective_rpc(_expert_bytes)[0]})
    while (batch := pipe.recv()) is not None:
        pipe.send(steps_of(llm, batch, CONTEXT, VOCABULARY, sampling)["step"])


def run(part: str, model: str, rounds: int, threads: int) -> tuple[dict[str, dict], dict[int, dict[str, list[float]]]]:
    """Return what each arm says of itself, and batch -> arm -> seconds of a step."""
    context, arms = multiprocessing.get_context("spawn"), list(ARMS[part])
    pipes, processes, states = {}, [], {}
    for arm in arms:
        pipes[arm], theirs = context.Pipe()
        process = context.Process(target=serve, args=(part, arm, model, threads, theirs), daemon=True)
        process.start()
        processes.append(process)
        theirs.close()
        states[arm] = pipes[arm].recv()
        print(f"{part} {arm}: loaded in {states[arm]['load']:.1f} s, {states[arm]['bytes'] / 1e6:.1f} MB of experts")
    found: dict[int, dict[str, list[float]]] = {batch: {arm: [] for arm in arms} for batch in BATCHES}
    for turn in range(rounds + 1):  # the first warms up
        for batch, times in found.items():
            for arm in [*arms[turn % len(arms) :], *arms[: turn % len(arms)]]:
                pipes[arm].send(batch)
                answer = pipes[arm].recv()
                if turn:
                    times[arm].append(answer)
            if turn:
                line = "  ".join(f"{arm} {1e3 * times[arm][-1]:.2f}" for arm in arms)
                print(f"{part} batch {batch} round {turn}: {line}", flush=True)
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
    return states, found


def rows_of(part: str, states: dict[str, dict], found: dict[int, dict[str, list[float]]]) -> list[dict[str, Any]]:
    label = "engine" if part == "wide" else "tiny"
    rows = []
    for arm, state in states.items():
        if arm == "stock":
            continue
        for batch, times in found.items():
            ratios = [a / b for a, b in zip(times["stock"], times[arm], strict=True)]
            rows.append(
                {
                    "name": f"moe.{label}_step_ms.b{batch}.{arm}", "value": 1e3 * median(times[arm]), "unit": "ms",
                    "incumbent": 1e3 * median(times["stock"]), "ratio": median(ratios), "bound": None,
                    "spread": (max(ratios) - min(ratios)) / median(ratios), "bytes": state["bytes"],
                    "bytes_of_stock": states["stock"]["bytes"],
                }
            )  # fmt: skip
        rows.append(
            {
                "name": f"moe.{label}_load_s.{arm}", "value": state["load"], "unit": "s",
                "incumbent": states["stock"]["load"], "ratio": states["stock"]["load"] / state["load"], "bound": None,
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from rl_accel.kernels.moe_int3 import cpp
    from rl_accel.quickstart.deep import MOE_POLICY

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for part in args.part:
            model = str(MOE_POLICY)
            if part == "wide":
                model = f"{folder}/wide"
                build_random(Path(model))
            rows += rows_of(part, *run(part, model, args.rounds, args.threads))
    for row in rows:
        print(f"{row['name']:45} {row['value']:9.3f} {row['incumbent']:9.3f} ratio {row['ratio']:.2f} "
              f"spread {row.get('spread', 0.0):.2f}")  # fmt: skip
    if args.json:
        conditions = {"name": "moe.engine_conditions", "machine": machine.describe(), "versions": versions.report()}
        conditions |= {"instructions": cpp.instructions(), "threads": args.threads}
        conditions |= {"command": f"scripts/bench_moe_engine.py --part {' '.join(args.part)} --rounds {args.rounds}"}
        args.json.write_text(json.dumps([*rows, conditions], indent=1) + "\n")


if __name__ == "__main__":
    main()
