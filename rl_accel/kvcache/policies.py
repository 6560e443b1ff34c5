"""Which policies the quantized KV cache can serve, told from config.json. Source: ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rl_accel.kernels.kv_int4.layout import LANES

MAX_HEAD_SIZE = 512
ALIBI = ("bloom", "mpt", "falcon", "baichuan", "jais")
"""Model types with ALiBi; of falcon and mpt only where their configuration says so."""


def unsupported(policy: Mapping[str, Any]) -> str:
    """Return what of a policy the quantized KV cache does not cover, "" if nothing.

    Args:
        policy: config.json of the text model, {} where it is not known.
    """
    kind = str(policy.get("model_type", ""))
    if policy.get("kv_lora_rank"):
        return "multi-head latent attention (MLA)"
    if policy.get("attn_logit_softcapping"):
        return "soft-capped attention scores"
    if kind == "gpt_oss":
        return "attention sinks"
    if _uses_window(policy):
        return "sliding windows"
    if kind in ALIBI and (kind not in ("mpt", "falcon") or policy.get("alibi") or _mpt_alibi(policy)):
        return "ALiBi"
    if policy.get("is_encoder_decoder"):
        return "encoders and cross-attention"
    size = head_size(policy)
    if size % LANES or size > MAX_HEAD_SIZE:
        return f"a head size of {size}: it must be a multiple of {LANES} up to {MAX_HEAD_SIZE}"
    return ""


def head_size(policy: Mapping[str, Any]) -> int:
    """Return the size of an attention head, 0 where it is not known."""
    if policy.get("head_dim"):
        return int(policy["head_dim"])
    hidden, heads = policy.get("hidden_size"), policy.get("num_attention_heads")
    return int(hidden) // int(heads) if hidden and heads else 0


def _uses_window(policy: Mapping[str, Any]) -> bool:
    if "sliding_attention" in (policy.get("layer_types") or ()):
        return True
    return bool(policy.get("sliding_window")) and bool(policy.get("use_sliding_window", True))


def _mpt_alibi(policy: Mapping[str, Any]) -> bool:
    attention = policy.get("attn_config")
    return isinstance(attention, Mapping) and bool(attention.get("alibi"))
