"""Measures K and Q of a policy: one forward over a text that is always the same, so engines and resumed runs agree.

Costs a step of `NUM_TOKENS` tokens whenever weights come. The text is random token ids: K's outliers are rows of the
weights that make it, whatever is said. Left out: pipeline ranks, which see no text of their own.

Host symbols: `set_forward_context` (forward_context.py), the arguments of a model's forward.
"""

from __future__ import annotations

from typing import Any

import torch

from rl_accel.kvcache.hosts.layers import QuantizedPages

NUM_TOKENS = 256
SEED = 20260419


def measured(runner: Any, impls: list[QuantizedPages]) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """Return K [N, K, C] and Q [N, H, C] of every layer, float32, in the order of `impls`; None of drafters' layers."""
    from vllm.forward_context import set_forward_context

    config, generator = runner.vllm_config, torch.Generator().manual_seed(SEED)
    # By the policy alone: engines of other limits must find the same.
    length = min(NUM_TOKENS, getattr(config.model_config.hf_text_config, "max_position_embeddings", NUM_TOKENS))
    ids = torch.randint(0, config.model_config.get_vocab_size(), (length,), generator=generator).to(runner.device)
    positions = torch.arange(length, device=runner.device)
    if getattr(runner, "uses_mrope", False):
        positions = positions.expand(3, -1).contiguous()
    for impl in impls:
        impl.measured = []
    try:
        context = set_forward_context(None, config, num_tokens=length, slot_mapping={}, skip_compiled=True)
        with torch.inference_mode(), context:
            runner.model(input_ids=ids, positions=positions)
        return [impl.measured[0] if impl.measured else None for impl in impls]
    finally:
        for impl in impls:
            impl.measured = None
