"""Start a vLLM engine on a policy with rl_accel settings and report what is live in it, as JSON on the last line.

    python -m rl_accel.hosts.vllm.probe MODEL '{"sampling": {"exact": true}}' '{"speculative_config": {...}}'

Asks the engine itself: the liveness record of its model runner, the speculation counters after a real generation, and
whether a request served alone gets the tokens that it got in a full batch.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

NUM_REQUESTS = 8
NUM_TOKENS = 48


def probe(model: str, settings: dict[str, Any], engine_args: dict[str, Any]) -> dict[str, Any]:
    """Return `live` (the runner's record), `spec_counts`, and `batch_invariant`."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=NUM_REQUESTS,
        additional_config={"rl_accel": settings},
        seed=0,
        **engine_args,
    )
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    prompt = {"prompt_token_ids": [(7 * i) % 200 + 10 for i in range(24)]}

    def params(index: int) -> SamplingParams:
        identity = {"problem_id": "doctor", "sample_index": index, "step": 0, "validate": False}
        return SamplingParams(
            temperature=1.0, max_tokens=NUM_TOKENS, ignore_eos=True, extra_args={"rl_accel": identity}
        )

    # Greedy text of any policy repeats itself, which is what a drafter needs to have something to propose.
    llm.generate([prompt], [SamplingParams(temperature=0.0, max_tokens=128, ignore_eos=True)], use_tqdm=False)
    everyone = list(range(NUM_REQUESTS))
    together = llm.generate([prompt] * NUM_REQUESTS, [params(i) for i in everyone], use_tqdm=False)
    alone = llm.generate([prompt], [params(3)], use_tqdm=False)
    stats = getattr(runner, "rl_accel_spec_stats", None)
    return {
        "live": dict(getattr(runner, "rl_accel_live", {})),
        "spec_counts": stats.drain() if stats is not None else None,
        "batch_invariant": list(together[3].outputs[0].token_ids) == list(alone[0].outputs[0].token_ids),
    }


if __name__ == "__main__":
    chosen, engine_args = map(json.loads, sys.argv[2:4])
    print(json.dumps(probe(sys.argv[1], chosen, engine_args)))
