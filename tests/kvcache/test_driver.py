"""The quantized KV cache in a verl configuration: what vLLM is asked for, and what is refused before it starts."""

from __future__ import annotations

import json

import pytest
from omegaconf import OmegaConf, open_dict

from rl_accel import recipes
from rl_accel.errors import ConfigError
from rl_accel.hosts.verl import prepare

ON = ["rl_accel.kvcache.enable=true", "rl_accel.allow_lossy=true", "rl_accel.run_dir=/somewhere"]


def preflight(*overrides: str, recipe: str = "gsm8k_grpo/cpu"):
    config = recipes.compose(recipe, list(overrides), has_gpu=False)
    return config, prepare.preflight(config)


def test_vllm_is_asked_for_the_pages() -> None:
    _, accel = preflight(*ON, "rl_accel.kvcache.int8_layers=2")
    asked = {name: value for name, (value, _) in prepare.engine_args(accel).items()}
    assert asked == {"kv_cache_dtype": "int4_per_token_head", "kv_cache_dtype_skip_layers": ["0", "1"]}
    settings = prepare.engine_settings(accel)
    assert settings["kvcache"]["enable"] and settings["allow_lossy"]
    _, accel = preflight("rl_accel.run_dir=/somewhere")
    assert prepare.engine_args(accel) == {} and "kvcache" not in prepare.engine_settings(accel)


def test_the_overlay_permits_enables_and_corrects() -> None:
    config, accel = preflight("rl_accel.run_dir=/somewhere", recipe="gsm8k_grpo/cpu+kvcache")
    assert accel.kvcache.enabled and accel.run.allow_lossy
    assert config.algorithm.rollout_correction.rollout_is == "token"
    assert config.trainer.total_training_steps == 64, "the recipe is below"
    with pytest.raises(ConfigError, match="Did you mean kvcache"):
        recipes.compose("gsm8k_grpo+kvcach", [], has_gpu=False)


def test_it_must_be_permitted() -> None:
    with pytest.raises(ConfigError, match="lossy"):
        preflight("rl_accel.kvcache.enable=true", "rl_accel.run_dir=/somewhere")


@pytest.mark.parametrize("enabled", [[], ["rl_accel.draft.method=ngram"]])
def test_stock_pages_of_4_bits_are_refused_on_a_cpu(enabled) -> None:
    """vLLM's CPU build takes the dtype and computes garbage, with rl_accel's settings or on a plain verl command."""
    dtype = "++actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_dtype=int4_per_token_head"
    with pytest.raises(ConfigError, match="writes garbage"):
        preflight(dtype, *enabled, "rl_accel.run_dir=/somewhere")
    plain = recipes.compose("gsm8k_grpo/cpu", [dtype], has_gpu=False)
    OmegaConf.set_struct(plain, False)
    plain.pop("rl_accel")
    plain.actor_rollout_ref.rollout.custom = OmegaConf.create({})
    with pytest.raises(ConfigError, match="writes garbage"):
        prepare.prepare(plain)
    plain.trainer.device = "cuda"  # where it works
    assert prepare.prepare(plain) is None


@pytest.mark.parametrize(
    ("policy", "overrides", "named"),
    [
        ({"kv_lora_rank": 512}, [], "MLA"),
        ({"head_dim": 80}, ["rl_accel.kvcache.order=32"], "does not divide"),
        ({}, ["actor_rollout_ref.rollout.engine_kwargs.vllm.block_size=24"], "multiple of 16"),
        ({}, ["++actor_rollout_ref.rollout.pipeline_model_parallel_size=2"], "set an order"),
        ({}, ["++actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_dtype=fp8"], "keep one"),
        (
            {},
            [
                "++actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_dtype_skip_layers=['3']",
                "rl_accel.kvcache.int8_layers=0",
            ],
            "keep one",
        ),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, policy, overrides, named) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 128, "num_attention_heads": 4, **policy}))
    config = recipes.compose(
        "gsm8k_grpo/cpu", [*ON, f"actor_rollout_ref.model.path={tmp_path}", *overrides], has_gpu=False
    )
    with pytest.raises(ConfigError, match=named):
        accel = prepare.preflight(config)
        with open_dict(config):
            prepare._pass_settings_to_vllm(config, accel)


def test_an_older_vllm_is_refused(monkeypatch) -> None:
    from rl_accel.hosts import versions
    from rl_accel.kvcache.hosts import driver

    monkeypatch.setattr(driver, "MIN_VLLM", (9, 0))
    assert not versions.is_older("vllm", (0, 1)) and not versions.is_older("not-there", (9,))
    with pytest.raises(ConfigError, match=r"needs vLLM 9\.0 or newer"):
        preflight(*ON)
