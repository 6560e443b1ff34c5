"""One engine of test_speculator_engine.py, its core in this process: `main()` is run by `run_ranks`, a fork a mode."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

import torch
from vllm import LLM, SamplingParams

NUM_PROBLEMS, NUM_SAMPLES, MAX_TOKENS = 12, 4, 48


def prompt(problem: int) -> list[int]:
    return [(7 * problem + j * j) % 40 + 5 for j in range(20 + problem)]


def params(problem: int, sample: int, step: int):
    identity = {"problem_id": f"p{step}-{problem}", "sample_index": sample, "step": step, "validate": False}
    warm = sample == 3  # one of four is sampled at temperature 1, with top-p
    return SamplingParams(
        temperature=1.0 if warm else 0.05,
        top_p=0.9 if warm else 1.0,
        max_tokens=MAX_TOKENS,
        ignore_eos=True,
        detokenize=False,
        extra_args={"rl_accel": identity},
    )


def engine(model: str, mode: str, **speculator):
    """The engine of a mode; `speculator`: settings of the feature on top."""
    from rl_accel.config import AccelConfig
    from rl_accel.hosts.verl.prepare import engine_args, engine_settings

    values: dict = {"sampling": {"exact": mode != "stock", "seed": 7}, "sync": {}, "fast_path": {}}
    if mode in ("model", "hinted"):
        values["draft"] = {"method": "model", "model": model, "num_speculative_tokens": 4}
    elif mode == "ahead":
        values["draft"] = {"method": "ahead", "model": model, "num_speculative_tokens": 4, "policy": "fixed"}
    elif mode != "plain":
        values["draft"] = {"method": "head", "policy": "fixed"}
        values["draft"] |= {} if "head" in speculator else {"num_speculative_tokens": 6}
        values["speculator"] = {
            "learn": mode in ("learns", "stock"), "publish_s": 0.3, "history": 2, "rejected_weight": 0.0,
            "max_trace_share": 1.0, "advance_s": 600.0, **speculator,
        }  # fmt: skip
    accel = AccelConfig.from_mapping(values)
    policy = json.loads((Path(model) / "config.json").read_text())
    args = {name: value for name, (value, _) in engine_args(accel, policy, Path(f"{model}-{mode}-files")).items()}
    return LLM(
        model,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=128 if mode == "stock" else 24,
        max_num_batched_tokens=1024 if mode == "stock" else 64,  # prompts are prefilled in parts
        block_size=32,
        tensor_parallel_size=2 if mode == "tp2" else 1,
        additional_config={"rl_accel": engine_settings(accel)},
        disable_log_stats=False,
        hf_overrides={"eos_token_id": None},
        async_scheduling=False if mode == "hinted" else None,
        **args,
    )


def generate(llm, step: int, between=None) -> list[list[int]]:
    """All requests of a step; `between` is called between engine steps."""
    core = llm.llm_engine
    names = [(p, s) for p in range(NUM_PROBLEMS) for s in range(NUM_SAMPLES)]
    for p, s in names:
        core.add_request(f"{step}:{p}:{s}", {"prompt_token_ids": prompt(p)}, params(p, s, step))
    done: dict[str, list[int]] = {}
    count = 0
    while core.has_unfinished_requests():
        if between is not None:
            between(count)
        for output in core.step():
            if output.finished:
                done[output.request_id] = list(output.outputs[0].token_ids)
        count += 1
    return [done[f"{step}:{p}:{s}"] for p, s in names]


def hinted(llm) -> dict:
    """Texts with hints that are right to the end, then wrong in the middle, of requests that end at a token of theirs;
    one at a time, so that an engine step has nobody who goes on."""
    found: dict = {"plain": [], "right": [], "wrong": [], "steps": []}
    for problem in range(4):
        alone = params(problem, 0, 5)
        (output,) = llm.generate([{"prompt_token_ids": prompt(problem)}], [alone], use_tqdm=False)
        said = list(output.outputs[0].token_ids)
        stop = said[4]
        cut = said[: said.index(stop) + 1]
        found["plain"].append(cut)
        for kind, hint in (
            ("right", cut),
            ("wrong", [*cut[:2], (cut[2] + 1) % 50, *cut[3:]] if len(cut) > 2 else [49]),
        ):
            ask = params(problem, 0, 5)
            ask.extra_args["rl_accel"]["hint"] = hint
            ask = SamplingParams(temperature=0.05, max_tokens=MAX_TOKENS, stop_token_ids=[stop], ignore_eos=True,
                                 detokenize=False, extra_args=ask.extra_args)  # fmt: skip
            llm.collective_rpc(_state)  # counts from here
            (output,) = llm.generate([{"prompt_token_ids": prompt(problem)}], [ask], use_tqdm=False)
            found[kind].append(list(output.outputs[0].token_ids))
            if kind == "right":
                found["steps"].append(llm.collective_rpc(_state)[0]["counts"])
    return found


def _state(worker) -> dict:
    runner = worker.model_runner
    role = runner.rl_accel.get("speculator")
    counts = runner.rl_accel_spec_stats.drain() if runner.rl_accel_spec_stats else {}
    return {"live": dict(runner.rl_accel_live), "counts": counts, "metrics": role.drain() if role else {}}


def _publish(worker, what: str) -> int:
    """Write a version as the trainer does: good, random, not finite, damaged, of another shape."""
    source = worker.model_runner.rl_accel["speculator"].source
    if source.client is None:
        return 0
    slots = source.client.slots
    generator = torch.Generator().manual_seed(slots.version)
    flat = 0.3 * torch.randn(len(source._flat), generator=generator).numpy()
    if what == "nan":
        flat[5] = float("nan")
    version = slots.put(flat)
    if what == "damaged":
        slots._slots[int(slots.memory.words[1])][0] += 1.0
    slots.memory.words[2] = slots.fingerprint + (what == "shape")
    return version


def _served(worker) -> tuple[int, float]:
    source = worker.model_runner.rl_accel["speculator"].source
    return source.version, float(source.head._flat.sum()) if source.head is not None else 0.0


def _call(worker, method: str, *args):
    return getattr(worker.model_runner.rl_accel["speculator"], method)(*args)


def _embeddings(worker) -> list[torch.Tensor]:
    """The policy's, and those that the head began with."""
    source = worker.model_runner.rl_accel["speculator"].source
    first = torch.from_numpy(source.client._first.data.view("float32").copy())
    return [worker.model_runner.model.model.embed_tokens.weight.detach().clone(), source.shape.split(first)["embed"]]


def _break_head(worker) -> None:
    """A weight of another shape, as a fault in the head's own code would show."""
    source = worker.model_runner.rl_accel["speculator"].source
    source.head._buffers["down"] = torch.zeros(3, 3)
    source.watch.begin()  # random heads have made it silent


def _kill_trainer(worker) -> None:
    os.kill(worker.model_runner.rl_accel["speculator"].source.client.pid, 9)


def _rows(worker) -> dict:
    """What the ring holds, and the policy's own hidden states and logits for the same texts."""
    source = worker.model_runner.rl_accel["speculator"].source
    _, rows, lost = source.client.ring.take(0)
    return {"rows": {name: torch.from_numpy(values.copy()) for name, values in rows.items()}, "lost": lost}


def swaps(llm) -> dict:
    """A version every other step, good ones and poison, requests in flight; what was served after each."""
    kinds, served, published = ("random", "nan", "damaged", "random", "shape"), [], []

    def between(count: int) -> None:
        if count % 2 == 0:
            kind = kinds[(count // 2) % len(kinds)]
            published.append((kind, llm.collective_rpc(_publish, args=(kind,))[0]))
        else:
            served.append(llm.collective_rpc(_served)[0])

    tokens = generate(llm, 0, between)
    llm.collective_rpc(_publish, args=("random",))
    return {"tokens": [tokens, generate(llm, 1)], "published": published, "served": served}


def learns(llm, folder: str) -> dict:
    """Rounds until the head is accepted, then its trainer is killed in flight, and another engine state is opened."""
    result: dict = {"tokens": [], "states": []}
    for step in range(2):
        result["tokens"].append(generate(llm, step))
        result["states"].append(llm.collective_rpc(_state)[0])
    result["rows"] = llm.collective_rpc(_rows)[0]
    step = 2
    end = time.monotonic() + 60
    while time.monotonic() < end:
        generate(llm, step)
        result["states"].append(llm.collective_rpc(_state)[0])
        step += 1
        counts = result["states"][-1]["counts"]
        if counts["num_accepted_tokens"] > 0.8 * counts["num_drafts"] > 100:
            break
    result["embeddings"] = llm.collective_rpc(_embeddings)[0]
    result["saved"] = llm.collective_rpc(_call, args=("save", f"{folder}/engine000.pt"))[0]
    result["opened"] = llm.collective_rpc(_call, args=("open", f"{folder}/engine000.pt"))[0]
    result["version"] = llm.collective_rpc(_served)[0][0]
    result["last"] = step

    def between(count: int) -> None:
        if count == 5:
            llm.collective_rpc(_kill_trainer)

    result["after_kill"] = generate(llm, step, between)
    result["states"].append(llm.collective_rpc(_state)[0])
    result["saved_without"] = llm.collective_rpc(_call, args=("save", f"{folder}/engine001.pt"))[0]
    return result


def stock(llm, num_requests: int) -> dict:
    """Samples of one prompt at temperature 1 by vLLM's own sampling, while the head learns them."""
    wanted = SamplingParams(temperature=1.0, top_k=3, max_tokens=5, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt(0)}] * num_requests, wanted, use_tqdm=False)
    tokens = torch.tensor([list(output.outputs[0].token_ids) for output in outputs])
    return {"tokens": tokens, "state": llm.collective_rpc(_state)[0]}


def ahead(llm, steps: list[int]) -> dict:
    """Steps, and one more of which the drafting process is killed in the middle."""

    def kill(worker) -> None:
        os.kill(worker.model_runner.drafter.source.client.pid, 9)

    def state(worker) -> dict:
        return _state(worker) | {"metrics": worker.model_runner.rl_accel["draft"].drain()}

    tokens = [generate(llm, step) for step in steps]
    before = llm.collective_rpc(state)[0]
    after_kill = generate(llm, steps[0], lambda count: llm.collective_rpc(kill) if count == 20 else None)
    llm.collective_rpc(state)
    without = generate(llm, steps[1])
    return {"tokens": tokens, "killed": [after_kill, without], "states": [before, llm.collective_rpc(state)[0]]}


def main() -> None:
    model, mode, steps = sys.argv[1:]
    llm = engine(model, mode)
    if mode == "hinted":
        result = {"tokens": [generate(llm, step) for step in map(int, steps.split(","))], "hints": hinted(llm)}
    elif mode == "ahead":
        result = ahead(llm, [int(step) for step in steps.split(",")])
    elif mode in ("plain", "model"):
        result = {"tokens": [generate(llm, step) for step in map(int, steps.split(","))]}
        result["state"] = llm.collective_rpc(_state)[0]
    elif mode == "tp2":
        result = {"tokens": [generate(llm, 0)], "states": llm.collective_rpc(_state)}
        llm.collective_rpc(_publish, args=("random",))
        result["tokens"].append(generate(llm, 1))
        result["states"] += llm.collective_rpc(_state)
    elif mode == "stock":
        result = stock(llm, int(steps))
    elif mode == "learns":
        result = learns(llm, f"{model}-{mode}")
    else:
        result = swaps(llm)
        result["state"] = llm.collective_rpc(_state)[0]
        path = f"{model}-{mode}/engine000.pt"
        llm.collective_rpc(_break_head)
        result["broken"] = generate(llm, 0)
        result["broken_state"] = llm.collective_rpc(_state)[0]
        result["checkpoint"] = [llm.collective_rpc(_call, args=(do, path))[0] for do in ("save", "open", "save")]
    Path(os.environ["RESULT"]).parent.mkdir(exist_ok=True)
    torch.save(result, os.environ["RESULT"])
