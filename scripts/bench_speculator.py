"""What the speculator brings to rollouts of one epoch: python scripts/bench_speculator.py [--json FILE] [options].

Every arm is an engine in a process of its own; only one runs at a time, all get the same requests step by step, in a
rotating order, and have to generate the same tokens. Problems do not repeat. Training, traces and swaps happen inside
the timed steps. Arms: none, vLLM's ngram, das, head, auto, and eagle3, the other kind of head. The policy is that of
recipe size `cpu_deep` (`--layers`); it does not move.

Rows: `speculator.rollout_ratio` (seconds of auto / none), `.rollout_ratio_to_best` (/ best of ngram and das),
`.later_ratio`, `.later_ratio_to_best` (the same of the second half of the steps, when the head has learned),
`.day0_share` (accept length of requests 384 to 640 / that of the last steps). With `--layers 4` the default policy,
where a head can hardly be worth it: `speculator.worst_ratio`. `--problems 128 --samples 1`: no sample has siblings.
With `--swaps` only `speculator.swap_p99_ms`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

ARMS = ("none", "ngram", "das", "head", "auto", "eagle3")
PROBLEMS, SAMPLES = 16, 8


def engine_of(arm: str, model: str, seed: int, draft: dict[str, Any] | None = None, **speculator: Any) -> Any:
    """Return an engine of this process.

    Args:
        draft, speculator: further settings of these features.
    """
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    from vllm import LLM

    from rl_accel.config import AccelConfig
    from rl_accel.hosts.verl.prepare import engine_args, engine_settings

    values: dict[str, Any] = {"sampling": {"exact": True, "seed": seed}, "sync": {}, "fast_path": {}}
    values["draft"] = {"method": "head" if arm == "eagle3" else arm, **(draft or {})}
    if arm in ("head", "auto", "eagle3"):
        values["speculator"] = {"seed": seed, "head": "eagle3" if arm == "eagle3" else "recurrent", **speculator}
    accel = AccelConfig.from_mapping(values)
    policy, folder = json.loads((Path(model) / "config.json").read_text()), Path(tempfile.mkdtemp())
    args = engine_args(accel, policy, folder)
    return LLM(
        model, dtype="float32", enforce_eager=True, max_model_len=656, max_num_seqs=128, block_size=32, seed=0,
        additional_config={"rl_accel": engine_settings(accel)},
        **{name: value for name, (value, _) in args.items()},
    )  # fmt: skip


def params_of(name: str, sample: int, step: int) -> Any:
    from vllm import SamplingParams

    identity = {"problem_id": name, "sample_index": sample, "step": step, "validate": False}
    return SamplingParams(temperature=1.0, max_tokens=320, detokenize=False, extra_args={"rl_accel": identity})


def serve(arm: str, model: str, seed: int, pipe: Any) -> None:
    """Answer blocks of requests until None comes."""
    llm = engine_of(arm, model, seed)
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    role = runner.rl_accel.get("speculator")
    pipe.send("ready")
    while (block := pipe.recv()) is not None:
        step, prompts, num_samples = block
        requests, params = [], []
        for name, ids in prompts:
            for sample in range(num_samples):
                requests.append({"prompt_token_ids": ids})
                params.append(params_of(name, sample, step))
        if role is not None:
            role.source.client.slots.allowed_share = role.source.ledger.share
        started = time.perf_counter()
        outputs = llm.generate(requests, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        if role is not None:
            role.source.client.slots.allowed_share = 0.0  # others are timed next
            while role.source.client.slots.busy:
                time.sleep(0.01)
        if arm == "das":
            runner.drafter.drafter.collect()
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        counts = runner.rl_accel_spec_stats.drain() if runner.rl_accel_spec_stats else {}
        pipe.send(
            {
                "seconds": seconds,
                "tokens": sum(map(len, tokens)),
                "crc": zlib.crc32(json.dumps(tokens).encode()),
                "counts": counts,
                "metrics": role.drain() if role is not None else {},
            }
        )


def prompts_of(model: str, num: int, seed: int) -> list[tuple[str, list[int]]]:
    from transformers import AutoTokenizer

    from rl_accel.quickstart.problems import generate

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [
        (
            problem.problem_id,
            list(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": problem.question}], add_generation_prompt=True
                )["input_ids"]
            ),
        )
        for problem in generate(num, seed=seed, split="train")
    ]


def run(
    arms: list[str], model: str, steps: int, seed: int, problems: int = PROBLEMS, samples: int = SAMPLES
) -> dict[str, list[dict[str, Any]]]:
    """Return a result per arm and step. Raises AssertionError if arms disagree on a token."""
    context, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    for arm in arms:
        pipes[arm], theirs = context.Pipe()
        process = context.Process(target=serve, args=(arm, model, seed, theirs))
        process.start()
        processes.append(process)
        theirs.close()
        assert pipes[arm].recv() == "ready"
    prompts = prompts_of(model, problems * (steps + 1), 1000 + seed)
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for step in range(steps + 1):  # the first warms up
        block = step, prompts[problems * step : problems * (step + 1)], samples
        turn = step % len(arms)
        for arm in [*arms[turn:], *arms[:turn]]:
            pipes[arm].send(block)
            answer = pipes[arm].recv()
            if step:
                results[arm].append(answer)
        if step:
            assert len({results[arm][-1]["crc"] for arm in arms}) == 1, f"step {step}: tokens differ"
            line = "  ".join(f"{arm} {results[arm][-1]['seconds']:.2f}" for arm in arms)
            metrics = results[arms[-1]][-1]["metrics"]
            print(
                f"seed {seed} step {step}: {line}  accept {accept_length(results[arms[-1]][-1:]):.2f} "
                f"train {metrics.get('train_s', 0):.1f} s share {metrics.get('train_share', 0):.2f}",
                flush=True,
            )
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
    return results


def swap_gaps(model: str, rounds: int = 8) -> list[dict[str, Any]]:
    """Return the row of what a swap a second adds to the 99th percentile of the time between two engine steps.

    The same requests with and without, in turn; each version has the weights of the one before, so drafts are equal.
    """
    llm = engine_of("head", model, 0, learn=False)
    engine = llm.llm_engine
    source = engine.model_executor.driver_worker.worker.model_runner.rl_accel["speculator"].source
    prompts, added, swaps = prompts_of(model, 4 * (rounds + 1), 77), [], 0
    for turn in range(rounds + 1):
        p99 = {}
        for swapping in (False, True) if turn % 2 else (True, False):
            for i, (name, ids) in enumerate(prompts[4 * turn : 4 * turn + 4]):
                for sample in range(SAMPLES):
                    engine.add_request(
                        f"{turn}{swapping}{i}.{sample}", {"prompt_token_ids": ids}, params_of(name, sample, 0)
                    )
            gaps, last = [], time.perf_counter()
            while engine.has_unfinished_requests():
                if swapping and time.perf_counter() - last >= 1.0:
                    last, swaps = time.perf_counter(), swaps + 1
                    source.client.slots.put(source._flat)
                started = time.perf_counter()
                engine.step()
                gaps.append(time.perf_counter() - started)
            p99[swapping] = statistics.quantiles(gaps, n=100)[98]
        if turn:  # the first warms up
            added.append(1e3 * (p99[True] - p99[False]))
    spent = source._seconds["swap"] / max(source._calls["swap"], 1)
    found = row("speculator.swap_p99_ms", added, "no swaps")
    return [{**found, "unit": "ms", "ratio": None, "swaps": swaps, "swap_ms": round(1e3 * spent, 3)}]


def accept_length(results: list[dict[str, Any]]) -> float:
    """Tokens a drafted step of a request yields: accepted ones and one of the target's."""
    drafts = sum(r["counts"].get("num_drafts", 0) for r in results)
    return 1.0 + sum(r["counts"].get("num_accepted_tokens", 0) for r in results) / max(drafts, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--problems", type=int, default=PROBLEMS, help="a step")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of a problem; with 1, history has nothing to say")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument(
        "--swaps", action="store_true", help="only what a swap a second adds to the time between tokens"
    )
    parser.add_argument("--json")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))

    from rl_accel.quickstart.deep import POLICY, deep_policy

    model = str(POLICY if args.layers == 4 else deep_policy(args.layers))
    if args.swaps:
        write(swap_gaps(model), args, {})
        return
    ratios, best_ratios, later, later_best, day0, curves = [], [], [], [], [], {}
    for seed in args.seeds:
        results = run(args.arms, model, args.steps, seed, args.problems, args.samples)
        total = {arm: sum(r["seconds"] for r in results[arm]) for arm in args.arms}
        best = min((arm for arm in args.arms if arm not in ("none", "head", "auto", "eagle3")), key=total.__getitem__)
        ratios.append(total["auto"] / total["none"])
        best_ratios.append(total["auto"] / total[best])
        half = {arm: sum(r["seconds"] for r in results[arm][args.steps // 2 :]) for arm in args.arms}
        later.append(half["auto"] / half["none"])
        later_best.append(half["auto"] / half[best])
        early = results["auto"][3:5]  # requests 384 to 640
        day0.append(accept_length(early) / accept_length(results["auto"][-5:]))
        curves[seed] = {
            arm: [[r["seconds"], accept_length([r]), r["metrics"].get("train_s", 0.0)] for r in results[arm]]
            for arm in args.arms
        }
        print(f"seed {seed}: " + "  ".join(f"{arm} {seconds:.1f} s" for arm, seconds in total.items()), flush=True)
    name = "speculator.rollout_ratio" if args.layers != 4 else "speculator.worst_ratio"
    rows = [
        row(name, ratios, "none"),
        row(name.replace("_ratio", "_ratio_to_best"), best_ratios, "best of ngram, das"),
        row("speculator.later_ratio", later, "none"),
        row("speculator.later_ratio_to_best", later_best, "best of ngram, das"),
        row("speculator.day0_share", day0, "accept length of the last 5 steps"),
    ]
    write(rows, args, curves)


def write(rows: list[dict[str, Any]], args: argparse.Namespace, curves: dict[int, Any]) -> None:
    for line in rows:
        print(line)
    if args.json:
        from rl_accel.machine import describe

        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"machine": describe(), "options": vars(args), "rows": rows, "curves": curves}, file, indent=1)


def row(name: str, values: list[float], incumbent: str) -> dict[str, Any]:
    return {
        "name": name,
        "value": round(statistics.median(values), 4),
        "unit": "1",
        "incumbent": incumbent,
        "ratio": round(1.0 / statistics.median(values), 4),
        "values": [round(value, 4) for value in values],
        "bound": None,
    }


if __name__ == "__main__":
    main()
