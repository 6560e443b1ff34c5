"""Policies that quantized pages do not serve are refused by name before anything is started."""

from __future__ import annotations

import pytest

from rl_accel.errors import ConfigError, NotLiveError
from rl_accel.kvcache.config import KVCacheConfig, skip_layers
from rl_accel.kvcache.hosts.layers import refuse
from rl_accel.kvcache.policies import head_size, unsupported

QWEN2 = {"model_type": "qwen2", "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("policy", "named"),
    [
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "MLA"),
        ({"model_type": "gemma2", "attn_logit_softcapping": 50.0}, "soft-capped"),
        ({"model_type": "gpt_oss"}, "sinks"),
        ({**QWEN2, "sliding_window": 4096, "use_sliding_window": True}, "sliding windows"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding windows"),
        ({"model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"]}, "sliding windows"),
        ({"model_type": "bloom"}, "ALiBi"),
        ({"model_type": "falcon", "alibi": True}, "ALiBi"),
        ({"model_type": "mpt", "attn_config": {"alibi": True}}, "ALiBi"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoders"),
        ({"model_type": "phi", "hidden_size": 1000, "num_attention_heads": 25}, "head size of 40"),
        ({"model_type": "qwen3", "head_dim": 1024}, "head size of 1024"),
    ],
)
def test_what_is_not_covered_is_named(policy, named) -> None:
    assert named in unsupported(policy)


@pytest.mark.parametrize(
    "policy",
    [
        {},
        QWEN2,
        {**QWEN2, "sliding_window": 131072, "use_sliding_window": False},
        {"model_type": "qwen3", "hidden_size": 1024, "num_attention_heads": 16, "head_dim": 80},
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "falcon", "alibi": False},
    ],
)
def test_what_is_covered_is_not_refused(policy) -> None:
    assert unsupported(policy) == ""


def test_the_head_size_is_told_or_follows() -> None:
    assert (head_size(QWEN2), head_size({"head_dim": 128, **QWEN2}), head_size({})) == (64, 128, 0)


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"sliding_window": 128}, "sliding windows"),
        ({"logits_soft_cap": 30.0}, "soft-capped"),
        ({"sinks": object()}, "sinks"),
        ({"attn_type": "encoder_only"}, "not causal"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "share K and V"),
        ({"head_size": 40}, "head size of 40"),
        ({"head_size": 576}, "head size of 576"),
    ],
)
def test_layers_are_refused_by_name(layer, named) -> None:
    plain = {
        "head_size": 64, "alibi_slopes": None, "sliding_window": None, "logits_soft_cap": None, "attn_type": "decoder",
        "sinks": None, "kv_sharing_target_layer_name": None,
    }  # fmt: skip
    refuse(**plain)
    refuse(**{**plain, "sliding_window": -1, "logits_soft_cap": 0})
    with pytest.raises(NotLiveError, match=named):
        refuse(**{**plain, **layer})


@pytest.mark.parametrize("values", [{"order": 24}, {"order": -1}, {"order": 512}, {"int8_layers": -1}])
def test_settings_out_of_range_are_refused(values) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        KVCacheConfig(**values)


def test_settings_say_what_depends_on_weights() -> None:
    assert KVCacheConfig().measures and KVCacheConfig(order=16).measures
    assert KVCacheConfig(order=16, balance=False, shift=True).measures
    assert not KVCacheConfig(order=16, balance=False).measures and not KVCacheConfig().enabled
    assert skip_layers(2) == ["0", "1"]
