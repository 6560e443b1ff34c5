"""One engine of test_das_engine.py, with the core in its process: `main()` is run by `run_ranks`, one fork a mode.

A random two-layer model whose cold samples repeat themselves between requests of one problem.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"

import torch
from das_workload import MAX_DRAFT, MAX_TOKENS, NUM_EPOCHS, NUM_PROBLEMS, NUM_SAMPLES
from vllm import LLM, SamplingParams


def prompt(problem: int) -> list[int]:
    return [(7 * problem + j * j) % 40 + 5 for j in range(20 + problem)]


def params(problem: int, sample: int, epoch: int, anonymous: bool, validate: bool = False, **more):
    identity = {"problem_id": f"p{problem}", "sample_index": sample, "step": epoch, "validate": validate, **more}
    extra = {"seed": 100 * epoch + sample} if anonymous else {"extra_args": {"rl_accel": identity}}
    return SamplingParams(temperature=0.05, max_tokens=MAX_TOKENS, ignore_eos=True, detokenize=False, **extra)


def run_engine(model: str, mode: str) -> dict:
    """Three epochs over six problems of four samples; returns tokens, counters and what is live."""
    from rl_accel.config import AccelConfig
    from rl_accel.hosts.verl.prepare import engine_args, engine_settings

    speculates, anonymous = not mode.startswith("plain"), mode == "serve"
    accel = AccelConfig.from_mapping(
        {
            "draft": {
                "method": "das",
                "num_speculative_tokens": MAX_DRAFT,
                "policy": "budget" if mode == "expensive" else "fixed",
            }
        }
    )
    additional = {"rl_accel": {"sampling": {"exact": True, "seed": 7}}}
    if speculates:
        additional["rl_accel"] |= engine_settings(accel)
    llm = LLM(
        model,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=96,
        max_num_seqs=24,
        max_num_batched_tokens=512,
        block_size=32,  # of 16 there are none on CPU from vLLM 0.29 on
        num_gpu_blocks_override=15 if "preempt" in mode else None,
        tensor_parallel_size=2 if mode == "tp2" else 1,
        speculative_config=engine_args(accel)["speculative_config"][0] if speculates else None,
        additional_config={} if anonymous else additional,
        disable_log_stats=False,
        hf_overrides={"eos_token_id": None},
    )
    result: dict = {"tokens": [], "stats": [], "live": llm.collective_rpc(_live)}
    if mode == "expensive":
        llm.collective_rpc(_teach_that_drafts_are_dear)
    for epoch in range(NUM_EPOCHS):
        wanted = [(p, s) for p in range(NUM_PROBLEMS) for s in range(NUM_SAMPLES)]
        outputs = llm.generate(
            [{"prompt_token_ids": prompt(p)} for p, _ in wanted],
            [params(p, s, epoch, anonymous) for p, s in wanted],
            use_tqdm=False,
        )
        result["tokens"].append([list(output.outputs[0].token_ids) for output in outputs])
        result["stats"].append(llm.collective_rpc(_close_epoch, args=(epoch,)))
    if mode == "das":
        llm.generate([{"prompt_token_ids": prompt(0)}], [params(0, 9, 9, False, validate=True)], use_tqdm=False)
        result["after_validation"] = llm.collective_rpc(_close_epoch, args=(9,))
        result["aborted"] = abort_two(llm)
        result["snapshots"] = llm.collective_rpc(_spoil_a_snapshot, args=(f"{model}-history",))[0]
        after = llm.generate([{"prompt_token_ids": prompt(0)}], [params(0, 0, 0, False)], use_tqdm=False)
        result["after_refusal"] = list(after[0].outputs[0].token_ids)
        result["hints"] = hinted(llm)
    if mode == "tp2":
        result["shared"] = share(llm)
    result["preemptions"] = sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
    return result


def abort_two(llm) -> dict:
    """Start four requests, abort two while they run; the others end and nothing is left behind."""
    engine = llm.llm_engine
    for i in range(4):
        engine.add_request(f"a{i}", {"prompt_token_ids": prompt(i)}, params(i, 0, 20, False))
    finished = {}
    for step in range(200):
        finished.update((o.request_id, o.outputs[0].finish_reason) for o in engine.step() if o.finished)
        if step == 3:
            engine.abort_request(["a0", "a1"])
        if not engine.has_unfinished_requests():
            break
    return {"finished": finished, "state": llm.collective_rpc(_close_epoch, args=(20,))}


def hinted(llm) -> dict:
    """Write a text whose like there was none, then again with hints of every kind; and all of them at once."""
    request = {"prompt_token_ids": [91, 92, 93, 94, 95, 96, 97, 98]}
    llm.collective_rpc(_close_epoch, args=(30,))
    (plain,) = llm.generate([request], [params(50, 0, 30, False, validate=True)], use_tqdm=False)
    said = list(plain.outputs[0].token_ids)
    hints = {
        "none": None, "right": said, "longer": [*said, 1, 2, 3], "first_half": said[: MAX_TOKENS // 2],
        "leaves": [*said[:9], (said[9] + 1) % 50, *said[10:]], "empty": [], "no_list": "5", "no_ids": [1.0, 2],
        "negative": [-1], "too_large": [1 << 20], "wrong": [(token + 1) % 50 for token in said],
    }  # fmt: skip
    found: dict = {"plain": said, "tokens": {}, "offered": {}, "drafts": {}}
    for name, hint in hints.items():
        more = {} if hint is None else {"hint": hint}
        (output,) = llm.generate([request], [params(50, 0, 30, False, validate=True, **more)], use_tqdm=False)
        found["tokens"][name] = list(output.outputs[0].token_ids)
        state = llm.collective_rpc(_close_epoch, args=(30,))[0]
        found["offered"][name], found["drafts"][name] = state["metrics"]["hinted_tokens"], state["counts"]
    together = llm.generate(
        [request] * len(hints),
        [params(50, 0, 30, False, validate=True, **({} if h is None else {"hint": h})) for h in hints.values()],
        use_tqdm=False,
    )
    found["together"] = [list(output.outputs[0].token_ids) for output in together]
    found["padded_plain"], found["padded"] = padded(llm, False), padded(llm, True)
    found["open"] = llm.collective_rpc(_close_epoch, args=(30,))[0]["open"]
    found["kept"] = llm.collective_rpc(_num_hints)[0]
    return found


def padded(llm, hinted: bool) -> list[int]:
    """A prompt that is cached but for its last token comes to a running request: vLLM pads its draft, hint or not."""
    request = {"prompt_token_ids": [(5 * i) % 40 + 3 for i in range(33)]}
    (said,) = llm.generate([request], [params(51, 0, 31, False, validate=True)], use_tqdm=False)
    tokens = list(said.outputs[0].token_ids)
    more = {} if not hinted else {"hint": [*tokens[:5], (tokens[5] + 1) % 50, *tokens[6:]]}
    engine, found = llm.llm_engine, {}
    engine.add_request("long", {"prompt_token_ids": prompt(1)}, params(52, 0, 31, False, validate=True))
    for step in range(200):
        if step == 2:
            engine.add_request("new", request, params(51, 0, 31, False, validate=True, **more))
        found.update((o.request_id, list(o.outputs[0].token_ids)) for o in engine.step() if o.finished)
        if step > 2 and not engine.has_unfinished_requests():
            break
    assert found["new"] == tokens, "beside another request it writes something else"
    return found["new"]


def _num_hints(worker) -> int:
    return len(worker.model_runner.drafter.hints)


def share(llm) -> dict:
    """Take what the engine said since; give it a segment larger than the message queue of its ranks."""
    import numpy as np

    from rl_accel.kernels.suffix.api import SuffixIndex

    llm.generate([{"prompt_token_ids": prompt(0)}], [params(0, 7, 7, False)], use_tqdm=False)
    taken = llm.collective_rpc(_take_segment)
    other = SuffixIndex(tokenizer=int.from_bytes(taken[0][32:40], "little"), cross_tokens=0)
    handle, size = other.begin(1, [1]), 2_200_000
    one = np.zeros(1, np.uint32)
    tokens, offsets = np.arange(size, dtype=np.int32), np.array([0, size], np.uint32)
    other.propose_batch(np.array([handle]), tokens, offsets, one, one.astype(np.float32))
    other.end(handle)
    other.close_epoch(7)
    segment = other.take_unshared()
    given = llm.collective_rpc(_add_segment, args=(segment,))
    held = llm.collective_rpc(_segments)[0]
    return {"taken": [len(t) for t in taken], "size": len(segment), "given": given, "held": held}


def _take_segment(worker) -> bytes:
    worker.model_runner.drafter.close_epoch(7, 7, share=True)
    return worker.model_runner.drafter.take_segment()


def _add_segment(worker, segment: bytes) -> bool:
    return worker.model_runner.drafter.add_segment(segment)


def _segments(worker) -> list[dict]:
    drafter = worker.model_runner.drafter.drafter
    return [] if drafter is None else drafter.index.segments()


def _live(worker) -> dict:
    return dict(worker.model_runner.rl_accel_live)


def _teach_that_drafts_are_dear(worker) -> None:
    """Report steps in which a draft token took as long as a whole step."""
    planner = worker.model_runner.drafter.drafter.planner
    for i in range(200):
        n, d = 1 + i % 24, (i % 2) * (1 + i % 7)
        planner.observe_step(0.01 + 1e-4 * n + 0.01 * d, n, d)


def _close_epoch(worker, epoch: int) -> dict:
    """What a worker knows at the end of an epoch: counters, the segment that was closed, what is still open."""
    runner = worker.model_runner
    counts = runner.rl_accel_spec_stats.drain() if runner.rl_accel_spec_stats else {}
    drafter = getattr(runner, "drafter", None)
    if drafter is None or drafter.drafter is None:
        return {"counts": counts}
    info = drafter.close_epoch(epoch, epoch)
    drafter.drafter.index.check_integrity()
    return {"counts": counts, "segment": info, "open": len(drafter.drafter), "metrics": drafter.drain_metrics()}


def _spoil_a_snapshot(worker, path: str) -> dict:
    """Save the history, read it back, then flip one bit of it and read it again."""
    drafter = worker.model_runner.drafter
    drafter.save(path)
    whole = drafter.open(path)
    segment = sorted(Path(path).glob("*.segment"))[0]
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    return {"whole": whole, "spoiled": drafter.open(path)}


def main() -> None:
    model, mode = sys.argv[1:]
    torch.save(run_engine(model, mode), os.environ["RESULT"])
