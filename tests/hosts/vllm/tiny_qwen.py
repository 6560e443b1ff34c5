"""A random Qwen2 of two layers in float32 for engine tests."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

VOCAB_SIZE = 300


def build_model(folder: Path, seed: int = 0, head_dim: int = 32, outlier: float = 0.0) -> None:
    """Write the model to a folder; its cold samples repeat themselves, so that drafts are accepted.

    Args:
        outlier: added to a dim of K that RoPE hardly turns, in all heads of the last layer.
    """
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=2 * head_dim,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = Qwen2ForCausalLM(config).to(torch.float32)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 0.02
    model.model.layers[-1].self_attn.k_proj.bias.data[12::head_dim] += outlier
    model.save_pretrained(folder)
