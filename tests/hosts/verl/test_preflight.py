"""Wrong input of every kind is one line, said before anything that takes seconds is imported, and leaves nothing."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf, open_dict

from rl_accel import doctor, recipes
from rl_accel.errors import ConfigError
from rl_accel.hosts.verl import model_files
from rl_accel.hosts.verl.prepare import BLOCK, accel_block, check, preflight, prepare

ROLLOUT = "actor_rollout_ref.rollout"
ACTOR = "actor_rollout_ref.actor"


@functools.cache
def recipe():
    return recipes.compose("gsm8k_grpo/cpu", [], has_gpu=False)


def composed(*overrides):
    """The recipe with overrides of Hydra's grammar; composing it anew for each would take most of the time."""
    config = copy.deepcopy(recipe())
    with open_dict(config):
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            OmegaConf.update(config, override.key_or_group, override.value(), merge=False)
    return config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl_accel.draft=das", "rl_accel.draft must be a group of settings"),
        ("rl_accel=5", "must be a group of settings"),
        ("rl_accel.seed=100000000000000000000000", "must be 0 to"),
        ("rl_accel.sampling.seed=-1", "must be 0 to"),
        ("rl_accel.sync.timeout_s=inf", "more than 0 s and at most"),
        ("rl_accel.sync.timeout_s=nan", "more than 0 s and at most"),
        ("rl_accel.draft.history_gib=inf", "positive and finite"),
        ("data.train_size=-5", "data.train_size=-5: must be at least 1"),
        ("data.train_size=0", "data.train_size=0: must be at least 1"),
        ("data.train_size=8", "less than data.train_batch_size=16"),
        (f"{ACTOR}.ppo_mini_batch_size=0", "must be at least 1"),
        (f"{ACTOR}.ppo_micro_batch_size_per_gpu=-8", "must be at least 1"),
        (f"{ACTOR}.optim.lr=nan", "must be a finite number"),
        (f"{ACTOR}.use_dynamic_bsz=5", "must be true or false"),
        ("trainer.n_gpus_per_node=0", "must be at least 1"),
        ("trainer.n_gpus_per_node=2", "num_gpus=1 logical devices"),
        ("ray_kwargs.ray_init.num_cpus=5", "would wait for ever for 6 logical processors"),
        ("trainer.nnodes=2", "no Ray cluster is given"),
        (
            "ray_kwargs.ray_init.address=auto",
            "ray_kwargs.ray_init.num_cpus=32: the Ray cluster at auto was started with",
        ),
        ("trainer.resume_mode=sometimes", "must be one of auto, disable, resume_path"),
        ("trainer.v1=5", "must be a group of settings"),
        ("trainer.balance_batch=maybe", "must be true or false"),
        (f"{ROLLOUT}.tensor_model_parallel_size=0", "must be at least 1"),
        (f"{ROLLOUT}.data_parallel_size=2", "counts and steers engines of tensor-parallel ranks only"),
        (f"{ROLLOUT}.pipeline_model_parallel_size=2", "counts and steers engines of tensor-parallel ranks only"),
        (f"{ROLLOUT}.n=abc", f"{ROLLOUT}.n=abc: must be a whole number"),
        (f"{ROLLOUT}.n=0", "must be at least 1"),
        (f"{ROLLOUT}.n={{a: 1}}", "is not a group of settings"),
        (f"{ROLLOUT}.temperature=0", "must be more than 0"),
        (f"{ROLLOUT}.max_model_len=100", "leave no tokens for a response"),
        (f"{ROLLOUT}.max_num_batched_tokens=100", "which vLLM refuses"),
        ("actor_rollout_ref.model.lora_rank=8", "LoRA needs a GPU"),
        ("algorithm.adv_estimator=grop", "verl 0.9.1 knows gae, grpo"),
    ],
)
def test_a_wrong_setting_is_named(override, message):
    with pytest.raises(ConfigError) as error:
        preflight(composed(override))
    assert message in str(error.value)


def test_a_context_longer_than_the_model_is_refused_with_the_users_own_number(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    config = composed(f"actor_rollout_ref.model.path={tmp_path}")
    with pytest.raises(ConfigError, match="max_model_len=640: the model has 512 positions"):
        preflight(config)


def test_an_olmoe_that_vllm_computes_otherwise_is_refused(tmp_path):
    config = composed(f"actor_rollout_ref.model.path={tmp_path}")
    for found, refused in (({"norm_topk_prob": True}, True), ({"norm_topk_prob": False}, False), ({}, False)):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "olmoe", **found}))
        if refused:
            with pytest.raises(ConfigError, match=r"an OLMoE with norm_topk_prob=true.*from another model"):
                preflight(config)
        else:
            preflight(config)
    config = composed(
        f"actor_rollout_ref.model.path={tmp_path}", "+actor_rollout_ref.model.override_config.norm_topk_prob=true"
    )
    with pytest.raises(ConfigError, match="an OLMoE"):
        preflight(config)


def test_a_draft_of_another_tokenizer_is_refused(tmp_path):
    """Models of one tokenizer are padded to different vocabularies, by less than a hundredth."""
    policy, draft = tmp_path / "policy", tmp_path / "draft"
    for folder in (policy, draft):
        folder.mkdir()
    (policy / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 152064}))
    config = composed(
        f"actor_rollout_ref.model.path={policy}", "rl_accel.draft.method=ahead", f"rl_accel.draft.model={draft}"
    )
    with pytest.raises(ConfigError, match="no model there"):
        check(config)
    for size, message in (
        (32000, "a vocabulary of 32000 tokens, the policy one of 152064"),
        (151936, "run_dir, which is not set"),
    ):
        (draft / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": size}))
        with pytest.raises(ConfigError, match=message):
            check(config)


@pytest.mark.parametrize(("positions", "engine"), [(640, 640), (650, 650), (4096, 656)])
def test_drafting_changes_neither_the_length_of_responses_nor_the_models_limit(tmp_path, positions, engine):
    """A draft more of context keeps drafting alive at its end; the user's length stays what limits responses."""
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": positions}))
    for name in ("train.parquet", "val.jsonl"):
        (tmp_path / name).touch()
    config = composed(
        f"actor_rollout_ref.model.path={tmp_path}",
        f"data.train_files={tmp_path}/val.jsonl",
        f"data.val_files={tmp_path}/val.jsonl",
        "rl_accel.draft.method=das",
        "rl_accel.run_dir=/nowhere",
    )
    prepare(config)
    rollout = config.actor_rollout_ref.rollout
    assert (rollout.max_model_len, rollout.engine_kwargs.vllm.max_model_len) == (640, engine)


@pytest.mark.parametrize(
    ("model", "local"),
    [
        ("gpt2", False),
        ("Qwen/Qwen3-0.6B", False),
        ("hdfs://cluster/models/policy", False),
        ("/models/policy", True),
        ("./policy", True),
        ("~/policy", True),
        ("models/of/mine", True),
    ],
)
def test_a_model_is_a_folder_a_hub_name_or_an_url(model, local):
    assert model_files.is_local(model) is local


def test_a_block_at_the_top_of_a_plain_verl_command_is_heard(tmp_path):
    """`main_ppo +rl_accel.draft.method=das`, as the table of flags spells it, once did nothing and said nothing."""
    (tmp_path / "rows.jsonl").touch()
    config = composed(
        f"actor_rollout_ref.model.path={tmp_path}",
        *(f"data.{part}_files={tmp_path}/rows.jsonl" for part in ("train", "val")),
    )
    with open_dict(config):
        del config.actor_rollout_ref.rollout.custom
        config.rl_accel = {"seed": 0, "run_dir": str(tmp_path), "draft": {"method": "das"}}
    assert prepare(config).draft.method == "das"
    assert OmegaConf.select(config, BLOCK).draft.method == "das"
    with open_dict(config):
        config.rl_accel = {"draft": {"method": "ngram"}}
    with pytest.raises(ConfigError, match="they differ; keep one place"):
        accel_block(config)


def run(module, *arguments, cwd=None, **env):
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env={**os.environ, "RL_ACCEL_DEVICE": "cpu", **env},
        check=False,
    )


def test_a_refusal_imports_nothing_that_takes_seconds(tmp_path):
    """torch takes 2 s, verl 10 s and more; a refusal comes before them, and before the progress bar."""
    code = (
        "import sys\n"
        "from rl_accel.train import main\n"
        "assert main(['recipe=gsm8k_grpo', 'actor_rollout_ref.rollout.n=abc']) == 1\n"
        "print([name for name in ('torch', 'verl', 'vllm', 'ray', 'transformers') if name in sys.modules])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "RL_ACCEL_DEVICE": "cpu"},
        check=True,
    )
    assert result.stdout.splitlines()[-1] == "[]"
    assert result.stderr.strip() == "rl_accel: actor_rollout_ref.rollout.n=abc: must be a whole number"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("", "makes no training"),
        ("a: [1\n", "expected ',' or ']'"),
        (
            "# @package _global_\ndefaults: [/ppo_trainer, _self_]\n",
            "Missing mandatory value",
        ),
        ("# @package _global_\ndefaults: [/no/such, _self_]\n", "no/such"),
    ],
)
def test_a_recipe_that_makes_no_training_is_told_in_one_error(tmp_path, recipe, message):
    (tmp_path / "mine.yaml").write_text(recipe)
    result = run("rl_accel.train", f"recipe={tmp_path}/mine.yaml", cwd=tmp_path)
    assert result.returncode == 1 and message in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.jsonl", b'{"question": 1'),
        ("train.jsonl", b"\xff\xfe\x00"),
        ("train.jsonl", b'{"question": 1, "answer": 2}'),
        ("train.jsonl", b"[" * 100_000),
        ("train.jsonl", b""),
        ("train.parquet", b"PAR1 and no more"),
    ],
)
def test_damaged_data_is_told_and_leaves_no_run_folder(tmp_path, name, content):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(content)
    result = run("rl_accel.train", "recipe=gsm8k_grpo", "data.source=gsm8k", f"data.path={tmp_path}/data", cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.startswith("rl_accel: ") and str(tmp_path) in result.stderr
    assert not list((tmp_path / "outputs").glob("*/*"))


@pytest.mark.parametrize("settings", ["draft.method=das", "rl_acel.draft.method=das", "rl_accel.draft.method", "a[="])
def test_the_doctor_refuses_what_it_would_not_look_at(settings, capsys):
    assert doctor.main([settings]) == 1
    assert "the doctor takes rl_accel.* settings" in capsys.readouterr().err
