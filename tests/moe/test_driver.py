"""Low-bit experts in a verl configuration: what vLLM is asked for, and what is refused before it starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from rl_accel import recipes
from rl_accel.errors import ConfigError
from rl_accel.hosts.verl import prepare
from rl_accel.moe import plan as plans

ON = ["rl_accel.moe.enable=true", "rl_accel.allow_lossy=true", "rl_accel.run_dir=/somewhere"]


@pytest.fixture
def policy(tmp_path: Path):
    """The files of a policy with experts; returns what writes them with another configuration."""

    def write(**changes: object) -> str:
        config = {"model_type": "qwen2_moe", "hidden_size": 64, "moe_intermediate_size": 96, "num_experts": 2}
        (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 2} | changes))
        parts = {f"model.layers.0.mlp.experts.{e}.{n}_proj.weight": torch.randn(64, 64) for e in range(2)
                 for n in ("gate", "up", "down")}  # fmt: skip
        save_file(parts, tmp_path / "model.safetensors")
        return f"actor_rollout_ref.model.path={tmp_path}"

    return write


def preflight(*overrides: str, recipe: str = "gsm8k_grpo/cpu"):
    config = recipes.compose(recipe, list(overrides), has_gpu=False)
    return config, prepare.preflight(config)


def test_vllm_is_asked_for_the_method(policy) -> None:
    _, accel = preflight(*ON, "rl_accel.moe.group_size=32", policy())
    assert {name: value for name, (value, _) in prepare.engine_args(accel).items()} == {"quantization": "milo"}
    settings = prepare.engine_settings(accel)
    assert settings["moe"]["enable"] and settings["moe"]["group_size"] == 32 and settings["allow_lossy"]
    _, accel = preflight("rl_accel.run_dir=/somewhere")
    assert prepare.engine_args(accel) == {} and "moe" not in prepare.engine_settings(accel)


def test_the_overlay_permits_enables_and_corrects(policy) -> None:
    overrides = ["rl_accel.run_dir=/somewhere", policy(moe_intermediate_size=128)]
    config, accel = preflight(*overrides, recipe="gsm8k_grpo/cpu+moe")
    assert accel.moe.enabled and accel.run.allow_lossy
    assert config.algorithm.rollout_correction.rollout_is == "token"


@pytest.mark.parametrize(
    ("overrides", "changes", "message"),
    [
        (["rl_accel.moe.enable=true"], {}, "lossy"),
        ([*ON], {"num_experts": 0}, "has no experts"),
        ([*ON], {}, r"expert's size: groups of 64 do not divide rows of 96 weights; a group size of 32 would"),
        (
            [*ON, "actor_rollout_ref.rollout.tensor_model_parallel_size=2"],
            {"moe_intermediate_size": 192},
            "tensor_model_parallel_size=2: an expert's size: groups of 64 do not divide rows of 96",
        ),
        (
            [*ON, "actor_rollout_ref.rollout.tensor_model_parallel_size=2", "rl_accel.moe.refresh=warm"],
            {"moe_intermediate_size": 128},
            "refresh=cold",
        ),
        ([*ON, "rl_accel.moe.bits=5"], {}, "must be one of 2, 3, 4"),
        ([*ON, "rl_accel.moe.ranks=budget"], {}, "budget_bits"),
        ([*ON, "rl_accel.moe.ranks=frequency"], {}, "routing counts"),
        ([*ON, "rl_accel.moe.alternations=0"], {}, "at least 1"),
        ([*ON, "rl_accel.moe.max_refresh_share=0"], {}, "max_refresh_share"),
        ([*ON, "rl_accel.moe.rank=-1"], {}, "negative"),
    ],
)
def test_what_cannot_work_is_refused(policy, overrides, changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight(*overrides, "rl_accel.run_dir=/somewhere", policy(**changes))


def test_the_method_alone_is_refused() -> None:
    """With rl_accel's settings or on a plain verl command: nothing permits what it loses."""
    method = "++actor_rollout_ref.rollout.engine_kwargs.vllm.quantization=milo"
    with pytest.raises(ConfigError, match=r"needs rl_accel\.moe\.enable=true"):
        preflight(method, "rl_accel.run_dir=/somewhere")
    plain = recipes.compose("gsm8k_grpo/cpu", [method], has_gpu=False)
    OmegaConf.set_struct(plain, False)
    plain.pop("rl_accel")
    plain.actor_rollout_ref.rollout.custom = OmegaConf.create({})
    with pytest.raises(ConfigError, match=r"needs rl_accel\.moe\.enable=true"):
        prepare.prepare(plain)


def test_bits_and_ranks_are_planned_from_the_policy_on_disk(policy, tmp_path: Path) -> None:
    files = [f"data.{kind}_files={tmp_path}/{kind}.jsonl" for kind in ("train", "val")]
    for kind in ("train", "val"):
        (tmp_path / f"{kind}.jsonl").touch()
    overrides = [policy(moe_intermediate_size=64, max_position_embeddings=1024), f"rl_accel.run_dir={tmp_path}", *files]
    asked = ["rl_accel.moe.ranks=budget", "rl_accel.moe.budget_bits=4.5"]
    config = recipes.compose("gsm8k_grpo/cpu", [*overrides, *ON[:2], *asked], has_gpu=False)
    prepare.prepare(config)
    file = config.actor_rollout_ref.rollout.engine_kwargs.vllm.additional_config.rl_accel.moe.plan
    assert {name: tensor.bits for name, tensor in plans.load(file).items()} == {
        "model.layers.0.mlp.experts.w13": 4,
        "model.layers.0.mlp.experts.w2": 4,
    }
