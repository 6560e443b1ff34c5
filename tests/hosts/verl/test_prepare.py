"""Checks before anything starts, and what an rl_accel block turns into."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest
from omegaconf import OmegaConf, open_dict

from rl_accel import recipes
from rl_accel.errors import ConfigError, VersionError
from rl_accel.hosts import versions
from rl_accel.hosts.verl import checks
from rl_accel.hosts.verl.prepare import accel_block, prepare


@pytest.fixture
def make_config(tmp_path):
    def make(*overrides):
        for name in ("train.jsonl", "val.jsonl"):
            (tmp_path / name).touch()
        (tmp_path / "config.json").write_text('{"max_position_embeddings": 1024}')
        return recipes.compose(
            "gsm8k_grpo/cpu",
            [
                f"data.train_files={tmp_path}/train.jsonl",
                f"data.val_files={tmp_path}/val.jsonl",
                f"actor_rollout_ref.model.path={tmp_path}",
                f"rl_accel.run_dir={tmp_path}",
                *overrides,
            ],
            has_gpu=False,
        )

    return make


def test_a_configuration_without_our_block_is_left_as_it_is(make_config):
    config = OmegaConf.create(OmegaConf.to_container(make_config(), resolve=True))
    del config.rl_accel, config.actor_rollout_ref.rollout.custom
    before = OmegaConf.to_yaml(config)
    assert prepare(config) is None
    assert OmegaConf.to_yaml(config) == before


def test_the_block_points_verl_at_our_classes(make_config):
    config = make_config("rl_accel.draft.method=ngram", "rl_accel.draft.num_speculative_tokens=3")
    accel = prepare(config)
    rollout = config.actor_rollout_ref.rollout
    assert accel.draft.method == "ngram"
    assert config.trainer.v1.trainer_mode == "rl_accel_sync"
    assert rollout.engine_kwargs.vllm.additional_config.rl_accel.sampling.exact is True
    assert rollout.engine_kwargs.vllm.speculative_config.num_speculative_tokens == 3
    assert (rollout.max_model_len, rollout.engine_kwargs.vllm.max_model_len) == (640, 640 + 3)
    assert "sync" in config.ray_kwargs.ray_init.runtime_env.env_vars.RL_ACCEL_ACTIVE.split(",")


def test_das_names_its_proposer_and_passes_its_settings(make_config):
    config = make_config("rl_accel.draft.method=das", "rl_accel.draft.window=3")
    prepare(config)
    rollout = config.actor_rollout_ref.rollout
    speculative = rollout.engine_kwargs.vllm.speculative_config
    assert speculative.model == "rl_accel.draft.hosts.proposer.DASProposer"
    assert speculative.num_speculative_tokens == 16
    assert rollout.engine_kwargs.vllm.additional_config.rl_accel.draft.window == 3
    assert (rollout.max_model_len, rollout.engine_kwargs.vllm.max_model_len) == (640, 640 + 16)


@pytest.mark.parametrize(
    ("overrides", "forced"),
    [
        ([], False),
        (["rl_accel.sampling.exact=true"], True),
        (["rl_accel.draft.method=das"], True),
        (["+actor_rollout_ref.rollout.engine_kwargs.vllm.speculative_config={model: m}"], True),
        (["actor_rollout_ref.model.mtp.enable=true"], False),
        ([f"actor_rollout_ref.model.mtp.{name}=true" for name in ("enable", "enable_rollout")], True),
    ],
)
def test_vllms_default_runner_is_given_up_only_where_something_needs_it(make_config, caplog, overrides, forced):
    config = make_config("rl_accel.sampling.exact=false", *overrides)
    with caplog.at_level("INFO", "rl_accel"):
        prepare(config)
    environment = config.ray_kwargs.ray_init.runtime_env.env_vars
    assert "sync" in environment.RL_ACCEL_ACTIVE.split(",") and len(environment.RL_ACCEL_RUN) == 8
    assert environment.get("VLLM_USE_V2_MODEL_RUNNER") == ("0" if forced else None)
    assert ("gives up V2" in caplog.text) == forced


def test_float32_means_float32(make_config):
    roles = ("actor", "ref")
    config = make_config(*(f"~actor_rollout_ref.{role}.fsdp_config.mixed_precision" for role in roles))
    prepare(config)
    for role in (config.actor_rollout_ref.actor, config.actor_rollout_ref.ref):
        assert role.fsdp_config.mixed_precision.param_dtype == "fp32"


def test_a_mixed_precision_of_the_users_own_stays(make_config):
    config = make_config("actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=bf16")
    prepare(config)
    assert config.actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype == "bf16"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train_batch_size=10", "actor_rollout_ref.actor.ppo_mini_batch_size=4"], "not a multiple of"),
        (["actor_rollout_ref.actor.ppo_mini_batch_size=64"], "larger than data.train_batch_size=16"),
        (["trainer.n_gpus_per_node=3", "ray_kwargs.ray_init.num_gpus=3"], "does not divide over 3 devices"),
        (["actor_rollout_ref.rollout.tensor_model_parallel_size=2"], "do not divide into engines of 2"),
        (["actor_rollout_ref.model.path=/no/such/model"], "/no/such/model: no such folder"),
        (["data.train_files=/no/such/file.parquet"], "data.train_files=/no/such/file.parquet: no such file"),
        (["trainer.v1.trainer_mode=separate_async"], "synchronous V1 trainer"),
        (["actor_rollout_ref.rollout.name=sglang"], "drives vLLM rollouts"),
        (["actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=10000000"], "/dev/shm has"),
        (["rl_accel.draft.method=ngrm"], "Did you mean 'ngram'?"),
        (["+actor_rollout_ref.rollout.agent.agent_loop_manager_class=a.B"], "it is set to a.B"),
    ],
)
def test_what_cannot_work_is_refused(make_config, overrides, message):
    with pytest.raises(ConfigError) as error:
        prepare(make_config(*overrides))
    assert message in str(error.value)


def test_suffix_without_its_package_is_refused(make_config, monkeypatch):
    stock = versions.installed
    monkeypatch.setattr(versions, "installed", lambda name: None if name == "arctic-inference" else stock(name))
    with pytest.raises(ConfigError, match="install_arctic"):
        prepare(make_config("rl_accel.draft.method=suffix"))


def test_a_gpu_run_on_a_machine_without_a_driver_is_refused(make_config, monkeypatch):
    def no_driver():
        raise OSError("no driver")

    pynvml = types.SimpleNamespace(nvmlInit=no_driver)
    monkeypatch.setitem(sys.modules, "pynvml", pynvml)
    with pytest.raises(ConfigError, match="no NVIDIA driver answers here"):
        prepare(make_config("trainer.device=cuda"))


@pytest.mark.parametrize(
    ("free_gib", "message"), [([70.0], "n_gpus_per_node=2; this machine has 1"), ([70.0, 3.0], "free on 1 GPUs")]
)
def test_too_few_or_too_full_gpus_are_refused(make_config, monkeypatch, free_gib, message):
    memories = [(int(gib * 2**30), 80 << 30) for gib in free_gib]
    monkeypatch.setattr(checks, "_gpu_memories", lambda: memories)
    with pytest.raises(ConfigError, match=message):
        prepare(make_config("trainer.device=cuda", "trainer.n_gpus_per_node=2"))


def test_two_speculative_configurations_are_refused(make_config):
    config = make_config("rl_accel.draft.method=ngram")
    with open_dict(config):
        config.actor_rollout_ref.rollout.engine_kwargs.vllm.speculative_config = {"method": "suffix"}
    with pytest.raises(ConfigError, match="both set; keep one"):
        prepare(config)


def test_too_little_memory_is_refused(make_config, monkeypatch):
    monkeypatch.setattr(checks, "MIN_FREE_MEMORY_CPU", 1 << 60)
    with pytest.raises(ConfigError, match="GiB are free"):
        prepare(make_config())


def test_an_untested_version_is_refused_before_anything_starts(make_config, monkeypatch):
    stock = versions.installed
    monkeypatch.setattr(versions, "installed", lambda name: "0.23.0" if name == "vllm" else stock(name))
    with pytest.raises(VersionError, match=r"vllm 0\.23\.0"):
        prepare(make_config())


def test_the_settings_reach_the_drop_in_form_resolved(make_config):
    assert accel_block(make_config("rl_accel.seed=9"))["sampling"]["seed"] == 9


def run_train(*overrides):
    return subprocess.run(
        [sys.executable, "-m", "rl_accel.train", *overrides],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "RL_ACCEL_DEVICE": "cpu"},
        check=False,
    )


def test_bad_input_is_one_line_and_starts_nothing(tmp_path):
    result = run_train(
        "recipe=gsm8k_grpo", "actor_rollout_ref.model.path=/no/such/model", f"rl_accel.run_dir={tmp_path}/run"
    )
    assert result.returncode == 1
    assert "rl_accel: actor_rollout_ref.model.path=/no/such/model: no such folder" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Ray instance" not in result.stderr + result.stdout
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step":1,"data":{}}\n')
    result = run_train("recipe=gsm8k_grpo", f"rl_accel.run_dir={tmp_path}", "trainer.resume_mode=disable")
    assert result.returncode == 1
    assert "already holds a run" in result.stderr
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step":1,"data":{}}\n'


def test_no_recipe_is_told_with_the_known_ones():
    result = run_train("trainer.total_epochs=1")
    assert result.returncode == 1
    assert "gsm8k_grpo/cpu" in result.stderr
