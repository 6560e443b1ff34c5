"""Recipes compose on verl's installed configuration, for every machine size and for a recipe of the user's own."""

import pytest

from rl_accel import recipes
from rl_accel.config import AccelConfig
from rl_accel.errors import ConfigError


@pytest.mark.parametrize("name", recipes.names())
def test_every_shipped_recipe_composes(name):
    config = recipes.compose(name, ["rl_accel.run_dir=/somewhere"], has_gpu=True)
    assert config.algorithm.adv_estimator == "grpo"
    assert config.actor_rollout_ref.rollout.name == "vllm"
    assert config.trainer.default_local_dir == "/somewhere/checkpoints"
    assert AccelConfig.from_mapping(dict(config.actor_rollout_ref.rollout.custom.rl_accel)).sampling.exact


def test_the_machine_chooses_the_size():
    assert recipes.compose("gsm8k_grpo", [], has_gpu=False).trainer.device == "cpu"
    assert recipes.compose("gsm8k_grpo", [], has_gpu=True).trainer.device == "cuda"


def test_overrides_reach_verl_and_rl_accel():
    config = recipes.compose("gsm8k_grpo", ["trainer.total_epochs=3", "rl_accel.draft.prompt_lookup_max=6"], False)
    assert config.trainer.total_epochs == 3
    assert config.actor_rollout_ref.rollout.custom.rl_accel.draft.prompt_lookup_max == 6


def test_one_seed_drives_all():
    config = recipes.compose("gsm8k_grpo", ["rl_accel.seed=5"], False)
    seeds = (
        config.data.seed,
        config.actor_rollout_ref.rollout.seed,
        config.actor_rollout_ref.actor.data_loader_seed,
        config.rl_accel.sampling.seed,
    )
    assert seeds == (5, 5, 5, 5)


def test_a_recipe_by_path_builds_on_a_shipped_one(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("# @package _global_\ndefaults: [/gsm8k_grpo/cpu, _self_]\ntrainer: {total_training_steps: 7}\n")
    config = recipes.compose(str(recipe), [], has_gpu=False)
    assert (config.trainer.total_training_steps, config.data.source) == (7, "generated")


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("gsm8k_grp", [], "Did you mean gsm8k_grpo?"),
        ("gsm8k_grpo/gpu4", [], "no such recipe"),
        ("nowhere/x.yaml", [], "no such file"),
        ("gsm8k_grpo", ["trainer.total_epoch=3"], "trainer.total_epoch"),
        ("gsm8k_grpo", ["a b"], "a b"),
    ],
)
def test_what_cannot_be_composed_is_named(recipe, overrides, message):
    with pytest.raises(ConfigError) as error:
        recipes.compose(recipe, overrides, has_gpu=False)
    assert message in str(error.value)
