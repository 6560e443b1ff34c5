"""One engine of test_eagle_engine.py; `main()` is run by `run_ranks`, a fork a mode."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import speculator_engine as spec  # sets the environment, so it comes before vLLM
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
    params = SamplingParams(temperature=0.0, max_tokens=spec.MAX_TOKENS, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": spec.prompt(p)} for p in range(12)], params, use_tqdm=False)
    counts = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    return {"calls": llm.collective_rpc(_recorded)[0], "counts": counts}


def _weights(worker) -> dict:
    """Of the served version: as published, and as vLLM's modules have them, packed copies or not."""
    runner = worker.model_runner
    source, draft = runner.rl_accel["speculator"].source, runner.drafter.model
    x = torch.randn(3, source.shape.width, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return {
            "version": source.version,
            "published": torch.from_numpy(source._flat.copy()),
            "served": source.head.flat(),
            "product": draft.model.layers[0].mlp.down_proj(torch.cat([x, x], -1))[0].clone(),
            "logits": draft.compute_logits(x).clone(),
            "x": x,
        }


def swaps(model: str) -> dict:
    """A version every other step, random ones and poison, requests in flight; the draft's weights after each."""
    llm = spec.engine(model, "eagle-swaps", head="eagle3", learn=False, draft_vocab=220)
    kinds, published, served = ("random", "nan", "random", "damaged", "shape"), [], []

    def between(count: int) -> None:
        if count % 2 == 0:
            kind = kinds[(count // 2) % len(kinds)]
            published.append((kind, llm.collective_rpc(spec._publish, args=(kind,))[0]))
        else:
            served.append(llm.collective_rpc(_weights)[0])

    found = {"first": llm.collective_rpc(_weights)[0]}
    found["tokens"] = [spec.generate(llm, 0, between), spec.generate(llm, 1)]
    found |= {"published": published, "served": served, "state": llm.collective_rpc(spec._state)[0]}
    return found


def _embeddings(worker) -> torch.Tensor:
    """Those that the head began with."""
    source = worker.model_runner.rl_accel["speculator"].source
    return source.shape.split(torch.from_numpy(source.client._first.data.view("float32").copy()))["embed"]


def _policy(worker) -> torch.Tensor:
    return worker.model_runner.model.model.embed_tokens.weight.detach().clone()


def _sync_policy(worker, path: str) -> None:
    """New weights for the policy, in the way in which they come from verl on a CPU."""
    from safetensors.torch import load_file
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    runner = worker.model_runner
    with set_current_vllm_config(runner.vllm_config), torch.no_grad():
        initialize_layerwise_reload(runner.model)
        runner.model.load_weights((name, 1.5 * weight) for name, weight in load_file(path).items())
        finalize_layerwise_reload(runner.model, runner.vllm_config.model_config)
    runner.rl_accel["speculator"].on_weights(runner, 0.0)


def _end_training(worker) -> None:
    worker.model_runner.rl_accel["speculator"].source.client.slots.allowed_share = 0.0


def learns(model: str) -> dict:
    """Rounds until drafts are accepted; then the state is saved and opened, a bad version comes, the policy moves."""
    llm = spec.engine(model, "learns", head="eagle3")
    found: dict = {"tokens": [], "states": [], "first": llm.collective_rpc(_embeddings)[0]}
    found["policy"] = llm.collective_rpc(_policy)
    end, step = time.monotonic() + 75, 0
    while time.monotonic() < end:
        tokens = spec.generate(llm, step)
        found["tokens"] += [tokens] if step < 2 else []
        found["states"].append(llm.collective_rpc(spec._state)[0])
        counts, judged = found["states"][-1]["counts"], found["states"][-1]["metrics"]["served_accept"]
        # The trainer judges what is served when it has a candidate, on a busy machine some steps later.
        if step > 1 and counts["num_accepted_tokens"] > 0.6 * counts["num_drafts"] > 100 and judged > 0.5:
            break
        step += 1
    found["path"] = f"{model}-eagle/engine000.pt"
    for what in ("save", "open"):
        found[what] = llm.collective_rpc(spec._call, args=(what, found["path"]))[0]
    found["opened"] = llm.collective_rpc(_weights)[0]
    llm.collective_rpc(_end_training)
    found["steps"] = [step + 1, step + 2]
    found["tokens"].append(spec.generate(llm, step + 1))
    found |= {"kept": llm.collective_rpc(_weights)[0], "before": llm.collective_rpc(spec._state)[0]}
    llm.collective_rpc(spec._publish, args=("random",))
    found["tokens"].append(spec.generate(llm, step + 2))
    found |= {"back": llm.collective_rpc(_weights)[0], "after": llm.collective_rpc(spec._state)[0]}
    for _ in range(2):
        found["policy"] += llm.collective_rpc(_policy)
        found.setdefault("draft", []).extend(llm.collective_rpc(_weights))
        llm.collective_rpc(_sync_policy, args=(f"{model}/model.safetensors",))
    return found


def plain(model: str, *steps: str) -> dict:
    llm = spec.engine(model, "plain")
    return {"tokens": [spec.generate(llm, int(step)) for step in steps]}


def main() -> None:
    mode, *args = sys.argv[1:]
    result = {"stock": stock, "plain": plain, "swaps": swaps, "learns": learns}[mode](*args)
    torch.save(result, Path(os.environ["RESULT"]))
