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


def test_the_trainer_is_chosen_on_top_of_the_recipe_and_below_the_overrides():
    plain = recipes.compose("gsm8k_grpo", [], has_gpu=False)
    config = recipes.compose("gsm8k_grpo", ["trainer=deepspeed"], has_gpu=False)
    strategies = (
        config.actor_rollout_ref.actor.strategy,
        config.actor_rollout_ref.ref.strategy,
        config.critic.strategy,
    )
    assert strategies == ("deepspeed", "deepspeed", "deepspeed")
    assert (config.trainer.n_gpus_per_node, config.ray_kwargs.ray_init.num_gpus) == (2, 2)
    assert config.trainer.total_training_steps == plain.trainer.total_training_steps
    config = recipes.compose("gsm8k_grpo", ["trainer.n_gpus_per_node=1", "trainer=deepspeed"], has_gpu=False)
    assert config.trainer.n_gpus_per_node == 1
    config = recipes.compose("gsm8k_grpo/gpu8", ["trainer=deepspeed"], has_gpu=True)
    assert (config.trainer.n_gpus_per_node, config.actor_rollout_ref.actor.strategy) == (8, "deepspeed")


def test_the_default_trainer_is_the_recipes_own():
    plain = recipes.compose("gsm8k_grpo", [], has_gpu=False)
    assert recipes.compose("gsm8k_grpo", ["trainer=fsdp"], has_gpu=False) == plain
    assert plain.actor_rollout_ref.actor.strategy == "fsdp2"


def test_a_trainer_by_path_builds_on_a_shipped_one(tmp_path):
    trainer = tmp_path / "mine.yaml"
    trainer.write_text(
        "# @package _global_\ndefaults: [/trainers/deepspeed/gpu, _self_]\ntrainer: {n_gpus_per_node: 4}\n"
    )
    config = recipes.compose("gsm8k_grpo", [f"trainer={trainer}"], has_gpu=False)
    assert (config.trainer.n_gpus_per_node, config.critic.strategy) == (4, "deepspeed")


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("gsm8k_grp", [], "Did you mean gsm8k_grpo?"),
        ("gsm8k_grpo/gpu4", [], "no such recipe"),
        ("nowhere/x.yaml", [], "no such file"),
        ("gsm8k_grpo", ["trainer=deepsped"], "Did you mean deepspeed?"),
        ("gsm8k_grpo", ["trainer=nowhere/x.yaml"], "trainer=nowhere/x.yaml: no such file"),
        ("gsm8k_grpo", ["trainer.total_epoch=3"], "trainer.total_epoch"),
        ("gsm8k_grpo", ["a b"], "a b"),
    ],
)
def test_what_cannot_be_composed_is_named(recipe, overrides, message):
    with pytest.raises(ConfigError) as error:
        recipes.compose(recipe, overrides, has_gpu=False)
    assert message in str(error.value)
