"""Are drafts as long as they should be? python scripts/bench_speculator_lengths.py [--json FILE] [options].

A head learns from 12 blocks of 128 requests and is saved; then engines draft with it, which learns no more, for 1 to 32
requests at once: not at all, a fixed number of tokens, and by cost (the default). Engines are processes of their own;
only one runs at a time, all get the same requests in a rotating order and have to generate the same tokens.

Rows: `speculator.utility` (seconds by cost / seconds of the best fixed length, the worst number of requests) and
`speculator.worst_ratio_small` (seconds by cost / without drafts, the worst number of requests); a value a seed.
`--layers 4` is the default policy.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
import zlib
from typing import Any

from bench_speculator import engine_of, params_of, prompts_of, row, write

SIZES = (1, 2, 4, 8, 16, 32)
LENGTHS = (1, 2, 3, 5, 8)
BY_COST, NONE = "by cost", "none"
LEARNING_BLOCKS, PROBLEMS, SAMPLES = 12, 16, 8
SPARSE = 4
"""Blocks that a round has where requests are few, so that all rounds take about as long."""


def serve(arm: str, model: str, seed: int, head: str, pipe: Any) -> None:
    """Answer blocks of requests until None comes; `learn` writes `head` at the end."""
    if arm == NONE:
        llm = engine_of("none", model, seed)
    elif arm == "learn":
        llm = engine_of("head", model, seed, advance_s=600.0)  # with so many requests it would not be worth it
    elif arm == BY_COST:
        llm = engine_of("head", model, seed, learn=False)
    else:
        llm = engine_of("head", model, seed, {"policy": "fixed", "num_speculative_tokens": int(arm)}, learn=False)
    role = llm.llm_engine.model_executor.driver_worker.worker.model_runner.rl_accel.get("speculator")
    if role is not None and arm != "learn":
        answer = role.open(head)
        assert not answer.get("error"), answer
    pipe.send("ready")
    while (blocks := pipe.recv()) is not None:
        seconds, tokens = 0.0, []
        for step, prompts, samples in blocks:
            asked = [(name, ids, sample) for name, ids in prompts for sample in range(samples)]
            requests = [{"prompt_token_ids": ids} for _, ids, _ in asked]
            params = [params_of(name, sample, step) for name, _, sample in asked]
            started = time.perf_counter()
            outputs = llm.generate(requests, params, use_tqdm=False)
            seconds += time.perf_counter() - started
            tokens.append([list(output.outputs[0].token_ids) for output in outputs])
        pipe.send((seconds, zlib.crc32(json.dumps(tokens).encode())))
    if arm == "learn":
        answer = role.save(head)
        assert not answer.get("error"), answer


def start(arm: str, model: str, seed: int, head: str) -> tuple[Any, Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(arm, model, seed, head, theirs))
    process.start()
    theirs.close()
    assert ours.recv() == "ready"
    return process, ours


def stop(process: Any, pipe: Any) -> None:
    pipe.send(None)
    process.join(60)
    if process.is_alive():
        process.kill()


def run(model: str, seed: int, rounds: int) -> dict[int, dict[str, list[float]]]:
    """Return the seconds of each arm and round, by the number of requests. Raises AssertionError if tokens differ."""
    with tempfile.TemporaryDirectory() as folder:
        head = f"{folder}/engine000.pt"
        process, pipe = start("learn", model, seed, head)
        prompts = prompts_of(model, PROBLEMS * LEARNING_BLOCKS, 1000 + seed)
        for step in range(LEARNING_BLOCKS):
            pipe.send([(step, prompts[PROBLEMS * step : PROBLEMS * (step + 1)], SAMPLES)])
            pipe.recv()
        stop(process, pipe)
        arms = [NONE, *map(str, LENGTHS), BY_COST]
        engines = {arm: start(arm, model, seed, head) for arm in arms}
    fresh = iter(prompts_of(model, (rounds + 2) * SPARSE * sum(SIZES), 5000 + seed))
    found: dict[int, dict[str, list[float]]] = {}
    for size in SIZES:
        found[size] = {arm: [] for arm in arms}
        for turn in range(rounds + 1):  # the first warms up
            blocks = [
                (turn, [next(fresh) for _ in range(size)], 1) for _ in range(max(SPARSE // size, 1) if size < 8 else 1)
            ]
            checks = set()
            for arm in [*arms[turn % len(arms) :], *arms[: turn % len(arms)]]:
                engines[arm][1].send(blocks)
                seconds, check = engines[arm][1].recv()
                checks.add(check)
                if turn:
                    found[size][arm].append(seconds)
            assert len(checks) == 1, f"{size} requests, round {turn}: tokens differ"
        sums = {arm: sum(values) for arm, values in found[size].items()}
        print(f"seed {seed}, {size} requests: " + "  ".join(f"{arm} {s:.2f}" for arm, s in sums.items()), flush=True)
    for process, pipe in engines.values():
        stop(process, pipe)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--json")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))

    from rl_accel.quickstart.deep import POLICY, deep_policy

    model = str(POLICY if args.layers == 4 else deep_policy(args.layers))
    utility, worst, curves = [], [], {}
    for seed in args.seeds:
        found = run(model, seed, args.rounds)
        sums = {size: {arm: sum(values) for arm, values in arms.items()} for size, arms in found.items()}
        utility.append(max(by[BY_COST] / min(by[str(length)] for length in LENGTHS) for by in sums.values()))
        worst.append(max(by[BY_COST] / by[NONE] for by in sums.values()))
        curves[seed] = found
    rows = [
        row("speculator.utility", utility, "best fixed length"),
        row("speculator.worst_ratio_small", worst, "none"),
    ]
    write(rows, args, curves)


if __name__ == "__main__":
    main()
