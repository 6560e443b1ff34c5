"""Names of weights as trainers send them, as a vLLM model reads them.

vLLM builds Mixtral (and what derives from it) with the names of Mixtral's checkpoints, `block_sparse_moe.experts.N.w1`.
Transformers 5 holds its experts under `mlp.experts` in two fused tensors, and verl's export, which ours uses as well,
makes of them `mlp.experts.N.gate_proj.weight`: vLLM then stops with a ValueError. Other models need nothing.
"""

from __future__ import annotations

import re

import torch

_BLOCK = "block_sparse_moe"
_EXPERTS = re.compile(r"\.experts(\.\d+)?\.(gate_up_proj|gate_proj|down_proj|up_proj)(?=\.|$)")
_PROJECTIONS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "gate_up_proj": "w13"}


def for_engine(model: torch.nn.Module, weights: list[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    """Return the weights under the names that `model.load_weights` takes.

    Args:
        model: of vLLM.
        weights: of a policy as transformers or a checkpoint name them, routed experts one by one or fused.
    """
    if not any(name.endswith(f".{_BLOCK}") for name, _ in model.named_modules()):
        return weights
    return [(_mixtral_name(name), tensor) for name, tensor in weights]


def _mixtral_name(name: str) -> str:
    def renamed(found: re.Match[str]) -> str:
        return f".experts{found[1] or ''}.{_PROJECTIONS[found[2]]}"

    return _EXPERTS.sub(renamed, name.replace(".mlp.", f".{_BLOCK}."))
