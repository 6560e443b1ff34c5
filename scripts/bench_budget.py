"""Does drafting ever cost time? none, the budget, the paper's classes and fixed lengths, 1 to 64 concurrent requests.

    python scripts/bench_budget.py [--concurrency 1,8,64] [--repeats 5] [--json FILE] [--plot FILE.png]

Every arm is a vLLM engine in a process of its own, on the tiny policy of the quickstart with exact sampling, so all
arms generate the same tokens. A block is one batch of requests; the arms run the same block one after the other, in
an order that turns, while the others wait. Two data sets: `rollouts` (problems that repeat, temperature 1) and
`noise` (temperature 2: little can be predicted). Reported: the median over blocks of an arm's time divided by `none`'s
for the same block; above 1 means slower than not drafting. Left out: the first blocks, in which an arm learns.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from typing import Any

ARMS = {
    "none": {"method": "none"},
    "budget": {"method": "das", "policy": "budget"},
    "classes": {"method": "das", "policy": "classes"},
    "fixed4": {"method": "das", "policy": "fixed", "num_speculative_tokens": 4},
    "fixed16": {"method": "das", "policy": "fixed", "num_speculative_tokens": 16},
}
TEMPERATURES = {"rollouts": 1.0, "noise": 2.0}
SAMPLES = 8
MAX_TOKENS = 128


def serve(arm: str, pipe: Any) -> None:
    """Run one engine; answer every (data, concurrency, step) with seconds, tokens and a digest of the tokens."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    import zlib
    from pathlib import Path

    import numpy as np
    from vllm import LLM, SamplingParams

    import rl_accel
    from rl_accel.config import AccelConfig
    from rl_accel.hosts.verl.prepare import engine_args, engine_settings
    from rl_accel.quickstart import problems

    accel = AccelConfig.from_mapping({"draft": ARMS[arm], "sampling": {"exact": True}})
    llm = LLM(
        str(Path(rl_accel.__file__).parent / "quickstart" / "policy"),
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=64,
        block_size=32,
        additional_config={"rl_accel": engine_settings(accel)},
        **{name: value for name, (value, _) in engine_args(accel).items()},
    )
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    tokenizer = llm.get_tokenizer()
    prompts = []
    for problem in problems.generate(64 // SAMPLES, seed=5):
        message = [{"role": "user", "content": problem.question}]
        prompts.append(list(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)))
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        data, concurrency, step = order
        requests, params = [], []
        for i in range(concurrency):
            name = {"problem_id": f"{data}{i // SAMPLES}", "sample_index": i % SAMPLES, "step": step, "validate": False}
            requests.append({"prompt_token_ids": prompts[i // SAMPLES]})
            params.append(
                SamplingParams(
                    temperature=TEMPERATURES[data],
                    max_tokens=MAX_TOKENS,
                    ignore_eos=data == "noise",
                    detokenize=False,
                    extra_args={"rl_accel": name},
                )
            )
        started = time.perf_counter()
        outputs = llm.generate(requests, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        if arm != "none":
            runner.drafter.close_epoch(step, step)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        drafted = runner.rl_accel_spec_stats.drain()["num_draft_tokens"] if arm != "none" else 0
        pipe.send(
            (seconds, sum(map(len, tokens)), zlib.crc32(np.concatenate(tokens).astype(np.int32).tobytes()), drafted)
        )


def measure(concurrencies: list[int], repeats: int) -> dict[tuple[str, int, str], dict[str, float]]:
    """Return (data, concurrency, arm) -> median and quartiles of the time ratio to `none`, and draft tokens a block."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for arm in ARMS:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(arm, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes[arm] = ours
        processes.append(process)
        assert ours.recv() == "ready"  # one after the other: loading needs the whole machine
    found = {}
    step = 0
    for data in TEMPERATURES:
        for concurrency in sorted(concurrencies, reverse=True):
            blocks: dict[str, list] = {arm: [] for arm in ARMS}
            warm_up = 3 if concurrency == max(concurrencies) else 1
            for block in range(warm_up + repeats):
                step += 1
                names = list(ARMS)
                for arm in names[block % len(names) :] + names[: block % len(names)]:
                    pipes[arm].send((data, concurrency, step))
                    answer = pipes[arm].recv()
                    if block >= warm_up:
                        blocks[arm].append(answer)
            for arm in ARMS:
                same = all(a[2] == b[2] for a, b in zip(blocks[arm], blocks["none"], strict=True))
                if not same:
                    raise SystemExit(f"{data}, {concurrency} requests: {arm} generated other tokens than none")
                ratios = [a[0] / b[0] for a, b in zip(blocks[arm], blocks["none"], strict=True)]
                quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
                found[data, concurrency, arm] = {
                    "ratio": statistics.median(ratios),
                    "low": quartiles[0],
                    "high": quartiles[2],
                    "drafted": statistics.mean(a[3] for a in blocks[arm]),
                    "tokens": statistics.mean(a[1] for a in blocks[arm]),
                }
                row = found[data, concurrency, arm]
                print(
                    f"{data:9} {concurrency:3} requests  {arm:8} time / none {row['ratio']:.3f} "
                    f"({row['low']:.3f} to {row['high']:.3f})  drafted {row['drafted']:.0f}",
                    flush=True,
                )
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(None)
        process.join(20)
    return found


def plot(found: dict[tuple[str, int, str], dict[str, float]], path: str) -> None:
    """Draw time relative to `none` over the number of concurrent requests, one panel a data set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(TEMPERATURES), figsize=(10, 4), sharey=True, squeeze=False)
    for axis, data in zip(axes[0], TEMPERATURES, strict=True):
        for arm in ARMS:
            points = sorted((n, row) for (d, n, a), row in found.items() if (d, a) == (data, arm))
            xs, ys = [n for n, _ in points], [row["ratio"] for _, row in points]
            axis.plot(xs, ys, "--" if arm == "none" else "o-", label=arm)
            axis.fill_between(xs, [r["low"] for _, r in points], [r["high"] for _, r in points], alpha=0.15)
        axis.set(xscale="log", title=data, xlabel="concurrent requests")
        axis.set_xticks(xs, [str(x) for x in xs])
    axes[0][0].set_ylabel("rollout time / time without drafts")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> int:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--concurrency", default="1,8,64")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json")
    parser.add_argument("--plot")
    arguments = parser.parse_args(argv)
    found = measure([int(n) for n in arguments.concurrency.split(",")], arguments.repeats)
    rows = [
        {
            "name": f"draft.time_ratio.{data}.{arm}.{concurrency}",
            "value": row["ratio"],
            "unit": "time / time of none",
            "incumbent": 1.0,
            "ratio": 1.0 / row["ratio"],
            "bound": None,
            "quartiles": [row["low"], row["high"]],
        }
        for (data, concurrency, arm), row in found.items()
        if arm != "none"
    ]
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=1)
    if arguments.plot:
        plot(found, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
