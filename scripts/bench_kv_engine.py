"""What the quantized KV cache brings in a vLLM engine.

    python scripts/bench_kv_engine.py [--part step default memory] [--rounds 5] [--json FILE]

Every arm is an engine in a process of its own that waits while others are timed; arms take turns by rounds.

    kv.engine_step_ms.<requests>x<context>.<arm>   a decoding step of a random model in bfloat16, 2 layers, 32 query and
                                                   8 KV heads of 128, one thread; incumbent: stock bfloat16 pages
    kv.engine_prefill_s.<requests>x<context>.<arm> all prompts of it
    kv.default_rollout_s.<arm>                     a step's rollouts of the default recipe, 128 requests; float32 pages
    kv.memory_rollout_s.<arm>                      the same of `cpu_deep` with 32 MiB for the KV cache: float32 pages of
                                                   about 17 requests

Arms: `int4.<instructions>`; of steps also stock `fp8`. Values are medians of rounds, `spread` their range as a share.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from bench_speculator import params_of, prompts_of

from rl_accel import machine
from rl_accel.hosts import versions

SHAPES = ((2, 4096), (8, 512))
STEPS = 24
MEMORY = 32 << 20
PROBLEMS, SAMPLES = 16, 8
INT4 = {"kv_cache_dtype": "int4_per_token_head"}


def build_random(folder: Path) -> None:
    """Write a Qwen3 of 2 layers with heads of 128 to a folder."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=2048, hidden_size=1024, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)


def engine_of(part: str, arm: str, model: str) -> Any:
    """Return an engine of this process."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    import torch
    from vllm import LLM

    ours = arm.startswith("int4")
    settings: dict[str, Any] = {"sampling": {"exact": True, "seed": 0}}
    args: dict[str, Any] = {"dtype": "float32", "max_model_len": 640, "max_num_seqs": 256, "block_size": 32}
    args["kv_cache_memory_bytes"] = MEMORY if part == "memory" else 1 << 30
    if part == "step":
        args |= {"dtype": "bfloat16", "max_model_len": 8192, "max_num_batched_tokens": 2048, "block_size": 128}
        args |= {"skip_tokenizer_init": True, "enable_prefix_caching": False}
        torch.set_num_threads(1)
    if ours:
        layers = 0 if part == "step" else 1  # one of two would be half of the cache
        settings |= {"allow_lossy": True, "kvcache": {"enable": True, "int8_layers": layers}}
        args |= {**INT4, "kv_cache_dtype_skip_layers": ["0"] * layers}
        from rl_accel.kernels.kv_int4 import cpp

        cpp.set_instructions(arm.split(".")[1])
    if arm == "fp8":
        args["kv_cache_dtype"] = "fp8"
    return LLM(model, enforce_eager=True, seed=0, additional_config={"rl_accel": settings}, **args)


def steps_of(
    llm: Any, num_requests: int, context: int, vocabulary: int = 2000, sampling: Callable[[int], dict] | None = None
) -> dict[str, float]:
    """Seconds of the prompts and of a decoding step.

    Args:
        vocabulary: prompts are of tokens below this + 3.
        sampling: parameters of a request by its number; greedy if not given.
    """
    from vllm import SamplingParams

    engine, times = llm.llm_engine, []
    for i in range(num_requests):
        ids = [(7 * j + 13 * i) % vocabulary + 3 for j in range(context)]
        how = sampling(i) if sampling else {"temperature": 0}
        params = SamplingParams(max_tokens=STEPS + 1, ignore_eos=True, detokenize=False, **how)
        engine.add_request(f"{context}-{i}", {"prompt_token_ids": ids}, params)
    started, prefill = time.perf_counter(), 0.0
    while engine.has_unfinished_requests():
        begun = time.perf_counter()
        outputs = engine.step()
        now = time.perf_counter()
        if prefill and len(outputs) == num_requests:
            times.append(now - begun)
        elif len(outputs) == num_requests:
            prefill = now - started
    return {"prefill": prefill, "step": median(times)}


def rollouts_of(llm: Any, prompts: list[tuple[str, list[int]]], step: int) -> dict[str, float]:
    requests = [({"prompt_token_ids": ids}, params_of(name, i, step)) for name, ids in prompts for i in range(SAMPLES)]
    started = time.perf_counter()
    outputs = llm.generate([r for r, _ in requests], [p for _, p in requests], use_tqdm=False)
    seconds = time.perf_counter() - started
    return {"rollout": seconds, "tokens": sum(len(output.outputs[0].token_ids) for output in outputs)}


def serve(part: str, arm: str, model: str, pipe: Any) -> None:
    llm = engine_of(part, arm, model)
    pipe.send(llm.llm_engine.vllm_config.cache_config.num_gpu_blocks)
    while (job := pipe.recv()) is not None:
        pipe.send(steps_of(llm, *job) if part == "step" else rollouts_of(llm, *job))


def run(part: str, arms: list[str], model: str, rounds: int) -> tuple[dict[str, int], dict[str, dict[str, list]]]:
    """Return blocks by arm, and job -> arm -> answers."""
    context, pipes, processes, blocks = multiprocessing.get_context("spawn"), {}, [], {}
    for arm in arms:
        pipes[arm], theirs = context.Pipe()
        process = context.Process(target=serve, args=(part, arm, model, theirs))
        process.start()
        processes.append(process)
        theirs.close()
        blocks[arm] = pipes[arm].recv()
    prompts = [] if part == "step" else prompts_of(model, PROBLEMS * (rounds + 1), 1000)
    found: dict[str, dict[str, list]] = {}
    for turn in range(rounds + 1):  # the first warms up
        if part == "step":
            jobs = {f"{n}x{length}": (n, length) for n, length in SHAPES}
        else:
            jobs = {"": (prompts[PROBLEMS * turn : PROBLEMS * (turn + 1)], turn)}
        for name, job in jobs.items():
            for arm in [*arms[turn % len(arms) :], *arms[: turn % len(arms)]]:
                pipes[arm].send(job)
                answer = pipes[arm].recv()
                if turn:
                    found.setdefault(name, {}).setdefault(arm, []).append(answer)
            if turn:
                line = "  ".join(f"{arm} {next(iter(v[-1].values())):.3f}" for arm, v in found[name].items())
                print(f"{part} {name} round {turn}: {line}", flush=True)
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
    return blocks, found


def rows_of(part: str, blocks: dict[str, int], found: dict[str, dict[str, list]]) -> list[dict[str, Any]]:
    rows, stock = [], next(iter(blocks))
    kinds = {"step": (("step", 1e3, "engine_step_ms"), ("prefill", 1.0, "engine_prefill_s"))}
    for name, answers in found.items():
        for key, scale, label in kinds.get(part, (("rollout", 1.0, f"{part}_rollout_s"),)):
            theirs = [scale * answer[key] for answer in answers[stock]]
            for arm in answers:
                ours = [scale * answer[key] for answer in answers[arm]]
                ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
                if part != "step":  # tokens differ: time a token
                    tokens = [[answer["tokens"] for answer in answers[a]] for a in (stock, arm)]
                    ratios = [r * b / a for r, a, b in zip(ratios, *tokens, strict=True)]
                if arm != stock:
                    rows.append(
                        {
                            "name": ".".join(filter(None, ("kv", label, name, arm))), "value": median(ours),
                            "unit": label.split("_")[-1], "incumbent": median(theirs), "ratio": median(ratios),
                            "bound": None, "spread": (max(ratios) - min(ratios)) / median(ratios),
                            "blocks_ratio": blocks[arm] / blocks[stock],
                        }
                    )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=["step", "default", "memory"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from rl_accel.kernels.kv_int4 import cpp
    from rl_accel.quickstart import deep

    sets = [name for name in ("avx2", "avx512") if _has(cpp, name)] or ["scalar"]
    root = Path(__file__).resolve().parent.parent
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for part in args.part:
            model, arms = str(root / "rl_accel/quickstart/policy"), ["float32", f"int4.{sets[-1]}"]
            if part == "step":
                model, arms = f"{folder}/random", ["bf16", "fp8", *(f"int4.{name}" for name in sets)]
                build_random(Path(model))
            if part == "memory":
                model = str(deep.deep_policy())
            rows += rows_of(part, *run(part, arms, model, args.rounds))
    for row in rows:
        print(f"{row['name']:45} {row['value']:9.3f} {row['incumbent']:9.3f} ratio {row['ratio']:.2f} "
              f"spread {row['spread']:.2f} blocks {row['blocks_ratio']:.2f}")  # fmt: skip
    if args.json:
        conditions = {"name": "kv.conditions", "machine": machine.describe(), "versions": versions.report()}
        conditions |= {"command": f"scripts/bench_kv_engine.py --part {' '.join(args.part)} --rounds {args.rounds}"}
        args.json.write_text(json.dumps([*rows, conditions], indent=1) + "\n")


def _has(cpp: Any, name: str) -> bool:
    before = cpp.instructions()
    try:
        cpp.set_instructions(name)
    except ValueError:
        return False
    finally:
        cpp.set_instructions(before)
    return True


if __name__ == "__main__":
    main()
