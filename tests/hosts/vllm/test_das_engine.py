"""DAS drafting inside a real vLLM engine: the same tokens as without, drafts that are accepted, and every way in which
requests come and go.

The engines run in processes of this same file (`python test_das_engine.py MODEL_DIR MODE OUT.json`), with the core in
the process, on a random two-layer model whose cold samples repeat themselves between requests of one problem.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MODES = ("plain", "das", "expensive", "serve", "preempt", "plain_preempt", "tp2")
NUM_PROBLEMS, NUM_SAMPLES, NUM_EPOCHS, MAX_TOKENS = 6, 4, 3, 48
MAX_DRAFT = 8


def helper():
    """The model and the process plumbing of the exact-sampling test."""
    path = Path(__file__).with_name("test_exact_engine.py")
    spec = importlib.util.spec_from_file_location("exact_engine", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prompt(problem: int) -> list[int]:
    return [(7 * problem + j * j) % 40 + 5 for j in range(20 + problem)]


def params(problem: int, sample: int, epoch: int, anonymous: bool, validate: bool = False):
    from vllm import SamplingParams

    identity = {"problem_id": f"p{problem}", "sample_index": sample, "step": epoch, "validate": validate}
    extra = {"seed": 100 * epoch + sample} if anonymous else {"extra_args": {"rl_accel": identity}}
    return SamplingParams(temperature=0.05, max_tokens=MAX_TOKENS, ignore_eos=True, detokenize=False, **extra)


def run_engine(model: str, mode: str) -> dict:
    """Three epochs over six problems of four samples; returns tokens, counters and what is live."""
    from vllm import LLM

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
        block_size=16,
        num_gpu_blocks_override=30 if "preempt" in mode else None,
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


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """MODE -> result, each engine started once."""
    folder = tmp_path_factory.mktemp("das")
    helper().build_model(folder / "model")
    results: dict[str, dict] = {}

    def run(mode: str) -> dict:
        if mode not in results:
            out = folder / f"{mode}.json"
            env = {
                **os.environ,
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_USE_V2_MODEL_RUNNER": "0",
                "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            }
            command = [sys.executable, __file__, str(folder / "model"), mode, str(out)]
            process = subprocess.run(command, capture_output=True, text=True, timeout=400, env=env, check=False)
            assert process.returncode == 0, (process.stdout + process.stderr)[-6000:]
            results[mode] = json.loads(out.read_text())
        return results[mode]

    return run


def accepted(result: dict, epoch: int) -> int:
    return result["stats"][epoch][0]["counts"]["num_accepted_tokens"]


def test_tokens_are_those_without_drafts(engines) -> None:
    das, plain = engines("das"), engines("plain")
    assert das["live"][0]["features"]["draft"] == "das" and "draft" not in plain["live"][0]["features"]
    assert das["tokens"] == plain["tokens"]


def test_later_epochs_accept_more(engines) -> None:
    das = engines("das")
    assert accepted(das, 0) > 0
    assert accepted(das, 2) > accepted(das, 0)
    assert das["stats"][2][0]["metrics"]["accepted_by_epoch_1"] > 0


def test_everything_that_ended_is_history_and_nothing_stays_open(engines) -> None:
    for epoch in engines("das")["stats"]:
        assert epoch[0]["open"] == 0
        assert epoch[0]["segment"]["num_rollouts"] == NUM_PROBLEMS * NUM_SAMPLES
        assert epoch[0]["segment"]["num_tokens"] == NUM_PROBLEMS * NUM_SAMPLES * MAX_TOKENS


def test_drafting_that_does_not_pay_turns_itself_off_and_loses_nothing(engines) -> None:
    """Hardly a draft is made, the index backs off, and history is still whole to the last token of every request.

    In the third epoch, after 128 steps, a probe finds that drafts cost less in fact.
    """
    expensive, das = engines("expensive"), engines("das")
    assert expensive["tokens"] == engines("plain")["tokens"]
    drafted, usual = (
        sum(epoch[0]["counts"]["num_draft_tokens"] for epoch in result["stats"][:2]) for result in (expensive, das)
    )
    assert drafted < 0.1 * usual
    for epoch in expensive["stats"]:
        assert epoch[0]["open"] == 0
        assert epoch[0]["segment"]["num_tokens"] == NUM_PROBLEMS * NUM_SAMPLES * MAX_TOKENS


def test_validation_leaves_no_history(engines) -> None:
    after = engines("das")["after_validation"][0]
    assert after["open"] == 0
    assert after["segment"]["num_tokens"] == 0


def test_a_snapshot_comes_back_and_a_damaged_one_is_refused(engines) -> None:
    """After the refusal the engine goes on, and samples what it would have sampled."""
    das = engines("das")
    assert das["snapshots"]["whole"]["restored"] is True
    assert das["snapshots"]["whole"]["tokens"] == das["aborted"]["state"][0]["segment"]["num_tokens"] > 0
    assert das["snapshots"]["spoiled"]["restored"] is False
    assert "damaged" in das["snapshots"]["spoiled"]["reason"]
    assert das["after_refusal"] == das["tokens"][0][0]


def test_aborted_requests_end(engines) -> None:
    aborted = engines("das")["aborted"]
    assert aborted["finished"] == {"a2": "length", "a3": "length"}
    assert aborted["state"][0]["open"] == 0
    assert 2 * MAX_TOKENS < aborted["state"][0]["segment"]["num_tokens"] < 4 * MAX_TOKENS
    assert aborted["state"][0]["segment"]["num_rollouts"] == 4


def test_preempted_requests_go_on_where_they_were(engines) -> None:
    """Too little KV cache for all: requests leave the batch and come back, and tokens stay the same."""
    das, plain = engines("preempt"), engines("plain_preempt")
    assert das["preemptions"] > 0, "the cache was large enough for all; the test tested nothing"
    assert das["tokens"] == plain["tokens"] == engines("plain")["tokens"]
    assert accepted(das, 2) > 0
    assert das["stats"][2][0]["segment"]["num_tokens"] == NUM_PROBLEMS * NUM_SAMPLES * MAX_TOKENS


def test_serving_without_verl_learns_from_its_own_traffic(engines) -> None:
    """No settings but `speculative_config`; problems are told apart by their prompts."""
    serve = engines("serve")
    assert serve["live"][0]["features"]["draft"] == "das" and serve["live"][0]["self_test"] == "passed"
    assert accepted(serve, 2) > accepted(serve, 0) > 0
    assert serve["stats"][0][0]["segment"]["num_problems"] == NUM_PROBLEMS


def test_tensor_parallel_ranks_take_one_ranks_drafts(engines) -> None:
    """Rank 0 drafts; both ranks verify the same drafts, so both count the same."""
    tp2 = engines("tp2")
    first, second = tp2["stats"][2]
    assert "segment" in first and "segment" not in second
    assert first["counts"] == second["counts"]
    assert first["counts"]["num_accepted_tokens"] > 0


def test_segments_of_any_size_step_between_engine_and_trainer(engines) -> None:
    """Only the rank that drafts gives and takes. 18 MB are more than one chunk of the queue to the ranks."""
    shared = engines("tp2")["shared"]
    first, second = shared["taken"]
    assert first > 8 * MAX_TOKENS and second == 0
    assert shared["size"] > 16 << 20 and shared["given"] == [True, False]
    assert [s["num_bytes"] for s in shared["held"] if s["foreign"]] == [shared["size"]]


def test_a_custom_class_without_the_plugin_is_refused() -> None:
    from types import SimpleNamespace

    from rl_accel.draft.hosts.proposer import DASProposer
    from rl_accel.errors import NotLiveError

    config = SimpleNamespace(
        additional_config=None,
        speculative_config=SimpleNamespace(num_speculative_tokens=8),
        model_config=SimpleNamespace(max_model_len=64),
    )
    with pytest.raises(NotLiveError, match=r"vllm\.general_plugins"):
        DASProposer(config).load_model()


if __name__ == "__main__":
    model_folder, engine_mode, output = sys.argv[1:]
    Path(output).write_text(json.dumps(run_engine(model_folder, engine_mode)))
