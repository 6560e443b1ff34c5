"""How often a policy's routers choose each expert, for `ranks=frequency` and the weights of `ranks=budget`.

`python -m rl_accel.moe.frequencies MODEL PROMPTS.parquet COUNTS.json [prompts=64] [tokens=256] [temperature=1.0]`
samples answers to prompts as verl holds them (the column `prompt`, chat messages) with transformers, and counts over
prompts and answers: what counts is where the policy itself goes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rl_accel.errors import MoEError
from rl_accel.moe import checkpoint

OPTIONS: dict[str, float] = {"prompts": 64, "tokens": 256, "temperature": 1.0, "seed": 0}


def count(model: Any, layers: Sequence[str], texts: Iterable[torch.Tensor]) -> dict[str, list[int]]:
    """Count choices over token ids.

    Args:
        model: a causal language model of transformers whose configuration has `num_experts_per_tok`.
        layers: names of its layers of experts, in order.
        texts: int64 [1, T] each.

    Raises:
        MoEError: if the model returns another number of routers.
    """
    chosen = model.config.num_experts_per_tok
    totals: list[torch.Tensor] = []
    with torch.inference_mode():
        for ids_1T in texts:
            logits = model(ids_1T.to(model.device), output_router_logits=True, use_cache=False).router_logits
            if len(logits) != len(layers):
                raise MoEError(f"the model has {len(logits)} routers and {len(layers)} layers of experts")
            found = [
                torch.bincount(each_TE.topk(chosen).indices.flatten().cpu(), minlength=each_TE.shape[-1])
                for each_TE in logits
            ]
            totals = [a + b for a, b in zip(totals, found, strict=True)] if totals else found
    return {name: total.tolist() for name, total in zip(layers, totals, strict=True)}


def sample(model: Any, tokenizer: Any, file: str, options: dict[str, float]) -> Iterator[torch.Tensor]:
    """Yield prompt and answer, int64 [1, T].

    Raises:
        MoEError: if the file has no prompts.
    """
    import pyarrow.parquet as pq

    try:
        prompts = pq.read_table(file, columns=["prompt"]).column("prompt").to_pylist()
    except (OSError, ValueError, KeyError) as error:
        raise MoEError(f"{file} has no column of prompts: {error}") from error
    if not prompts:
        raise MoEError(f"{file} has no prompts")
    torch.manual_seed(int(options["seed"]))
    for messages in prompts[: int(options["prompts"])]:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        yield model.generate(
            ids["input_ids"].to(model.device),
            attention_mask=ids["attention_mask"].to(model.device),
            max_new_tokens=int(options["tokens"]),
            do_sample=options["temperature"] > 0,
            temperature=options["temperature"] or None,
            top_k=0,
        )


def main(arguments: Sequence[str]) -> None:
    """
    Raises:
        MoEError: if model, prompts or options do not fit.
    """
    if len(arguments) < 3 or arguments[0].startswith("-"):
        sys.exit(
            "usage: python -m rl_accel.moe.frequencies MODEL PROMPTS.parquet COUNTS.json "
            + " ".join(f"[{name}={value}]" for name, value in OPTIONS.items())
        )
    folder, prompts, out, *given = arguments
    options = dict(OPTIONS)
    for part in given:
        name, _, value = part.partition("=")
        if name not in options:
            raise MoEError(f"{name} is no option; there are {', '.join(options)}")
        options[name] = float(value)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rl_accel import machine
    from rl_accel.quickstart.deep import shipped_policy

    folder = shipped_policy(folder)
    layers = checkpoint.expert_layers(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    model.to("cuda" if machine.has_gpu() else "cpu")
    found = count(model, layers, sample(model, AutoTokenizer.from_pretrained(folder), prompts, options))
    Path(out).write_text(json.dumps(found, indent=1) + "\n")
    for name, counts in found.items():
        total = sum(counts)
        print(f"{name:40s} {len(counts)} experts, from {min(counts) / total:.1%} to {max(counts) / total:.1%}")


if __name__ == "__main__":
    main(sys.argv[1:])
