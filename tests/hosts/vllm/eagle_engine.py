"""One engine of test_eagle_engine.py; `main()` is run by `run_ranks`, a fork a mode."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from speculator_engine import MAX_TOKENS, prompt  # sets the environment, so it comes before vLLM
from vllm import LLM, SamplingParams

import torch  # isort: skip

NUM_DRAFT = 4


def _record(worker) -> None:
    """Keep what the runner hands to its drafter, and the drafts."""
    runner = worker.model_runner
    runner.recorded, inner = [], runner.drafter.propose

    def propose(**given):
        starts = given["common_attn_metadata"].query_start_loc.clone()
        ends = given["token_indices_to_sample"]
        drafts = inner(**given)
        runner.recorded.append(
            {
                "requests": list(runner.input_batch.req_ids),
                "starts": starts[:-1],
                "ends": (starts[1:] if ends is None else ends + 1).clone(),
                "positions": given["target_positions"].clone(),
                "tokens": given["target_token_ids"].clone(),
                "next_tokens": given["next_token_ids"].clone(),
                "aux": given["target_hidden_states"].clone(),
                "drafts": drafts.clone(),
            }
        )
        return drafts

    runner.drafter.propose = propose


def _recorded(worker) -> list[dict]:
    return worker.model_runner.recorded


def stock(model: str, folder: str) -> dict:
    """vLLM without anything of ours, drafting by an exported head."""
    llm = LLM(
        model,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=8,
        max_num_batched_tokens=64,  # prompts are prefilled in parts
        block_size=32,
        enable_prefix_caching=False,
        disable_log_stats=False,
        hf_overrides={"eos_token_id": None},
        speculative_config={"method": "eagle3", "model": folder, "num_speculative_tokens": NUM_DRAFT},
    )
    llm.collective_rpc(_record)
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": prompt(p)} for p in range(12)], params, use_tqdm=False)
    counts = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    return {"calls": llm.collective_rpc(_recorded)[0], "counts": counts}


def main() -> None:
    mode, model, *rest = sys.argv[1:]
    torch.save({"stock": stock}[mode](model, *rest), Path(os.environ["RESULT"]))
