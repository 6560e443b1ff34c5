"""Whose run is in a folder: the resolved configuration decides, the command where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rl_accel import recipes
from rl_accel.compare.reuse import check_same_settings
from rl_accel.errors import CompareError

RECIPE = """# @package _global_
defaults:
  - /gsm8k_grpo/cpu
  - _self_
data:
  source: files
  train_files: train.parquet
  val_files: val.parquet
actor_rollout_ref:
  model:
    path: /a/model
  actor:
    optim:
      lr: 1e-5
"""
OVERRIDES = ["rl_accel.draft.method=ngram", "rl_accel.seed=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Path, list[str]]:
    """A recipe of the user's own, and a folder with what `train` writes for it before it starts."""
    folder = tmp_path_factory.mktemp("run")
    recipe, run_dir = folder / "mine.yaml", folder / "ngram-seed1"
    recipe.write_text(RECIPE)
    run_dir.mkdir()
    config = recipes.compose(str(recipe), [*OVERRIDES, f"rl_accel.run_dir={run_dir}"], has_gpu=False)
    OmegaConf.save(config, run_dir / "config.yaml", resolve=True)
    return recipe, run_dir, [f"recipe={recipe}", *OVERRIDES]


def test_the_same_meaning_in_other_words_is_the_same_run(run):
    _, run_dir, settings = run
    check_same_settings(run_dir, [settings[0], *reversed(OVERRIDES), "actor_rollout_ref.actor.optim.lr=0.00001"])


def test_an_edited_recipe_is_another_run(run):
    """The command is the same, and the log too: only the resolved configuration tells."""
    recipe, run_dir, settings = run
    recipe.write_text(RECIPE.replace("1e-5", "1e-4"))
    told = r"ngram-seed1 holds a run with other settings: .*optim\.lr was 1e-05, is 0\.0001"
    with pytest.raises(CompareError, match=told):
        check_same_settings(run_dir, settings)
    recipe.write_text("a: [")
    for wrong in (settings, settings[1:]):
        with pytest.raises(CompareError, match="a list of settings"):
            check_same_settings(run_dir, wrong)


def test_a_folder_without_a_run_may_be_used(tmp_path):
    check_same_settings(tmp_path / "absent", ["recipe=r"])
    (tmp_path / "data").mkdir()
    (tmp_path / "run.json").write_text(json.dumps({"wandb_run_id": "a"}))  # interrupted while it was set up
    check_same_settings(tmp_path, ["recipe=r"])


@pytest.mark.parametrize("left", ["metrics.jsonl", "tokens", "checkpoints"])
@pytest.mark.parametrize("info", [None, {}, {"command": "python"}, {"command": ["python", "train.py", "recipe=r"]}])
def test_a_run_that_does_not_say_what_it_is_may_not_be_used(tmp_path, left, info):
    (tmp_path / left).mkdir()
    if info is not None:
        (tmp_path / "run.json").write_text(json.dumps(info))
    with pytest.raises(CompareError, match="does not say how it was started"):
        check_same_settings(tmp_path, ["recipe=r"])


def test_the_command_decides_where_there_is_no_configuration(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    command = ["python", "-m", "rl_accel.train", "recipe=r", "lr=1", "rl_accel.run_dir=/elsewhere"]
    (tmp_path / "run.json").write_text(json.dumps({"command": command}))
    check_same_settings(tmp_path, ["recipe=r", "lr=1"])
    with pytest.raises(CompareError, match="It ran recipe=r lr=1; asked for is recipe=r lr=2"):
        check_same_settings(tmp_path, ["recipe=r", "lr=2"])
