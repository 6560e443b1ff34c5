"""Random mixtures of experts of two layers for engine tests: 8 experts, of which a token takes 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 200
PROMPTS = [[(7 * i + j * j) % 150 + 5 for j in range(24 + 5 * i)] for i in range(6)]
KINDS = ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe")


def build_model(kind: str, folder: Path, dtype: torch.dtype, seed: int = 0, **changes: Any) -> None:
    """Write a model to a folder.

    Routers decide clearly, so that rounding seldom sends a token to another expert. A token depends mostly on the one
    before, so that texts repeat themselves and drafts are accepted.
    """
    import transformers

    common = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.12,
        "tie_word_embeddings": False,
        "num_experts_per_tok": 2,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    own = {
        "qwen2_moe": ("Qwen2Moe", {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 32}),
        "qwen3_moe": ("Qwen3Moe", {"moe_intermediate_size": 64, "head_dim": 32, "norm_topk_prob": True}),
        "mixtral": ("Mixtral", {"num_local_experts": 8, "intermediate_size": 64, "sliding_window": None}),
        "olmoe": ("Olmoe", {"intermediate_size": 64}),
    }
    name, settings = own[kind]
    if kind != "mixtral":
        settings["num_experts"] = 8
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**{**common, **settings, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            torch.nn.init.normal_(parameter, std=1.0)
        if name.endswith("o_proj.weight"):
            parameter.data *= 0.05
    model.to(dtype).save_pretrained(folder)


def trained_weights(folder: Path, dtype: torch.dtype, fused: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what verl's FSDP engine sends of a model, or, fused, what transformers holds."""
    from transformers import AutoModelForCausalLM
    from verl.utils.model import convert_weight_keys
    from verl.workers.engine.fsdp.utils import unfuse_moe_params

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    weights = convert_weight_keys(model.state_dict(), model).items()
    yield from weights if fused else unfuse_moe_params(weights, model.config.model_type)


def exported_names(folder: Path) -> list[str]:
    """Return the names under which our DeepSpeed engine sends the weights of a model."""
    from transformers import AutoModelForCausalLM

    from rl_accel.deepspeed.hosts.weights import full_tensors
    from rl_accel.hosts.verl.export import exported

    model = AutoModelForCausalLM.from_pretrained(folder)
    return [name for name, _ in exported(full_tensors(model), model, model.config.model_type, "cpu")]


def log_probs(folder: Path, texts: list[list[int]]) -> list[torch.Tensor]:
    """Return the log-probs of every token of each text but its first, by transformers in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for text in texts:
        ids_T = torch.tensor(text)
        with torch.inference_mode():
            logits_TV = model(ids_T[None]).logits[0]
        found.append(logits_TV.log_softmax(-1)[:-1].gather(1, ids_T[1:, None])[:, 0])
    return found
