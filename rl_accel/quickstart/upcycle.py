"""A dense Qwen2 made into a Qwen2-MoE that computes the same: exact sparse upcycling.

Of every MLP, the neurons with the largest down-projections become the shared expert, and each routed expert gets all
others. The weights of the experts that a token is routed to sum to one, so whichever they are, the sum is the dense
MLP's. Cost: one copy of the weights an expert. Not covered: models with other activations or with biases in their MLP.

Source: "Sparse Upcycling", Komatsuzaki et al., ICLR 2023; differs: the shared expert, and a start that is exact.
Shapes: H hidden size, I neurons of the dense MLP, S of the shared expert, E experts.
"""

from __future__ import annotations

from typing import Any

import torch

from rl_accel.errors import ConfigError

COPIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "tie_word_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""Settings of the dense model that the other one has as well."""


def upcycle(dense: Any, num_experts: int, experts_per_token: int, shared: int, router_std: float) -> Any:
    """Return a `Qwen2MoeForCausalLM` with the logits of `dense`, to rounding, and random routers.

    Args:
        dense: a `Qwen2ForCausalLM`.
        num_experts, experts_per_token: E, and how many of them a token takes.
        shared: S, neurons of the shared expert; the routed experts have I - S each.
        router_std: standard deviation of the router's weights, drawn from torch's global generator.

    Raises:
        ConfigError: if S is not between 0 and I.
    """
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    given = dense.config
    if not 0 < shared < given.intermediate_size:
        raise ConfigError(
            f"shared={shared} neurons for the shared expert; the dense MLP has {given.intermediate_size}: give a "
            "number in between, so that both kinds of experts have some"
        )
    config = Qwen2MoeConfig(
        **{name: getattr(given, name) for name in COPIED},
        num_experts=num_experts,
        num_experts_per_tok=experts_per_token,
        moe_intermediate_size=given.intermediate_size - shared,
        shared_expert_intermediate_size=shared,
        norm_topk_prob=True,  # weights of the chosen experts sum to one, which makes the start exact
    )
    moe = Qwen2MoeForCausalLM(config).to(dense.dtype)
    source, target = dense.state_dict(), moe.state_dict()
    with torch.no_grad():
        for name, tensor in source.items():
            if ".mlp." not in name:
                target[name].copy_(tensor)
        for layer in range(given.num_hidden_layers):
            _fill_layer(source, target, f"model.layers.{layer}.mlp", shared, router_std)
    return moe


def _fill_layer(source: dict, target: dict, mlp: str, shared: int, router_std: float) -> None:
    gate_IH, up_IH, down_HI = (source[f"{mlp}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    order = down_HI.norm(dim=0).argsort(descending=True, stable=True)
    common, routed = order[:shared].sort().values, order[shared:].sort().values
    target[f"{mlp}.shared_expert.gate_proj.weight"].copy_(gate_IH[common])
    target[f"{mlp}.shared_expert.up_proj.weight"].copy_(up_IH[common])
    # Its own gate starts at sigmoid(0) = 1/2 for every token.
    target[f"{mlp}.shared_expert.down_proj.weight"].copy_(2 * down_HI[:, common])
    target[f"{mlp}.shared_expert_gate.weight"].zero_()
    target[f"{mlp}.experts.gate_up_proj"].copy_(torch.cat([gate_IH[routed], up_IH[routed]]))
    target[f"{mlp}.experts.down_proj"].copy_(down_HI[:, routed])
    target[f"{mlp}.gate.weight"].normal_(std=router_std)
