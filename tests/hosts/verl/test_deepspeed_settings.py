"""What `strategy=deepspeed` turns a verl configuration into, and what is refused before anything starts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf, open_dict

from rl_accel import recipes
from rl_accel.errors import ConfigError, VersionError
from rl_accel.hosts import versions
from rl_accel.hosts.verl.prepare import prepare

ACTOR = "actor_rollout_ref.actor"


@pytest.fixture
def make_config(tmp_path):
    def make(*overrides, trainer="deepspeed"):
        (tmp_path / "data.jsonl").touch()
        paths = [f"data.{part}_files={tmp_path}/data.jsonl" for part in ("train", "val")]
        paths += [f"{role}.model.path={tmp_path}" for role in ("actor_rollout_ref", "critic")]
        paths += [f"rl_accel.run_dir={tmp_path}"]
        return recipes.compose("gsm8k_grpo/cpu", [f"trainer={trainer}", *paths, *overrides], has_gpu=False)

    return make


COMM = ("rl_accel.comm.enable=true", "rl_accel.allow_lossy=true")


def without_our_block(config):
    """The same training as a plain verl command would ask for it."""
    plain = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    del plain.rl_accel, plain.actor_rollout_ref.rollout.custom
    return plain


def test_every_role_gets_the_settings_class(make_config):
    config = make_config(
        "rl_accel.deepspeed.zero_stage=3",
        "rl_accel.deepspeed.ds_config.zero_optimization.stage3_param_persistence_threshold=7",
    )
    prepare(config)
    for node in (
        config.actor_rollout_ref.actor.fsdp_config,
        config.actor_rollout_ref.ref.fsdp_config,
        config.critic.fsdp,
    ):
        assert node._target_ == "rl_accel.deepspeed.hosts.engine_config.DeepSpeedEngineConfig"
        assert node.zero_stage == 3
        assert node.ds_config.zero_optimization.stage3_param_persistence_threshold == 7
        assert node.get("rl_accel") is None


def test_a_plain_verl_configuration_may_name_the_engine(make_config):
    config = without_our_block(make_config())
    assert prepare(config) is None
    assert config.actor_rollout_ref.actor.fsdp_config.zero_stage == 2
    assert config.trainer.v1.trainer_mode == "sync"


def test_verl_builds_the_settings_and_deepspeed_accepts_them(make_config, monkeypatch):
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    from verl.utils.config import omega_conf_to_dataclass

    from rl_accel.deepspeed.hosts.engine_config import DeepSpeedEngineConfig, make_ds_config, param_dtype

    config = make_config("rl_accel.deepspeed.ds_config={zero_optimization: {round_robin_gradients: true}}")
    prepare(config)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert isinstance(actor.engine, DeepSpeedEngineConfig)
    assert actor.engine.strategy == "deepspeed"
    assert param_dtype(actor.engine) == torch.float32
    made = make_ds_config(actor.engine, 900_001, "cpu", clip_grad=0.5)
    assert made["gradient_clipping"] == 0.5
    assert made["zero_optimization"]["stage"] == 2
    assert made["zero_optimization"]["round_robin_gradients"] is True
    assert made["zero_optimization"]["reduce_bucket_size"] >= 900_001
    assert "bf16" not in made


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rl_accel.deepspeed.zero_stage=4"], "must be 1, 2 or 3; got 4"),
        (["rl_accel.deepspeed.zero_stag=1"], "Did you mean 'zero_stage'?"),
        (["rl_accel.deepspeed.ds_config.train_batch_size=8"], "use data.train_batch_size"),
        (["rl_accel.deepspeed.ds_config.gradient_clipping=8"], "use actor.optim.clip_grad"),
        (["rl_accel.deepspeed.ds_config.zero_optimization.stage=1"], "use rl_accel.deepspeed.zero_stage"),
        ([f"{ACTOR}.ulysses_sequence_parallel_size=2"], "no sequence parallelism"),
        ([f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size=2"], "no sequence parallelism"),
        ([f"{ACTOR}.fsdp_config.fsdp_size=4"], "ZeRO shards over all ranks"),
        ([f"{ACTOR}.fsdp_config.offload_policy=true"], "offload_policy is FSDP2's"),
        ([f"{ACTOR}.fsdp_config.mixed_precision.param_dtype=fp16"], "trains in bfloat16 or float32; got fp16"),
        ([f"++{ACTOR}.qat.enable=true"], "quantization-aware"),
        (["actor_rollout_ref.model.lora_rank=8"], "LoRA needs strategy=fsdp2"),
        (["actor_rollout_ref.model.enable_activation_offload=true"], "enable_activation_offload needs strategy=fsdp2"),
        ([f"{ACTOR}.optim.optimizer=Muon"], "element-wise optimizer"),
        ([f"{ACTOR}.optim.optimizer_impl=bitsandbytes.optim"], "element-wise optimizer"),
        ([f"{ACTOR}.checkpoint.save_contents=[model]"], "model and optimizer together"),
        (
            ["rl_accel.deepspeed.zero_stage=3", f"{ACTOR}.fsdp_config.optimizer_offload=true", "trainer.device=cuda"],
            "at ZeRO 1 and 2 only",
        ),
    ],
)
def test_what_the_engine_cannot_do_is_refused(make_config, overrides, message):
    with pytest.raises(ConfigError) as error:
        prepare(make_config(*overrides))
    assert message in str(error.value)


def test_settings_that_no_role_uses_are_refused(make_config):
    with pytest.raises(ConfigError, match="no role trains with DeepSpeed"):
        prepare(make_config("rl_accel.deepspeed.zero_stage=1", trainer="fsdp"))


def test_communication_goes_to_the_roles_that_train(make_config):
    config = make_config(*COMM, "rl_accel.comm.bypass=never")
    prepare(config)
    actor, ref, critic = config.actor_rollout_ref.actor.fsdp_config, config.actor_rollout_ref.ref, config.critic.fsdp
    assert actor.rl_accel.comm.bypass == critic.rl_accel.comm.bypass == "never"
    assert "enable" not in actor.rl_accel.comm
    assert ref.fsdp_config.get("rl_accel") is None


def test_communication_goes_into_verls_fsdp2_engine(make_config):
    config = make_config(*COMM, "rl_accel.comm.bypass=never", trainer="fsdp")
    prepare(config)
    actor, ref = config.actor_rollout_ref.actor, config.actor_rollout_ref.ref
    assert actor.strategy == actor.fsdp_config.strategy == "fsdp2"
    built = instantiate(actor.fsdp_config)
    assert type(built).__name__ == "FSDP2Config"
    assert built.rl_accel["comm"]["bypass"] == "never"
    assert "rl_accel" not in ref.fsdp_config
    off = make_config(trainer="fsdp")
    prepare(off)
    assert "rl_accel" not in off.actor_rollout_ref.actor.fsdp_config


@pytest.mark.parametrize(
    ("overrides", "trainer", "message"),
    [
        (("actor_rollout_ref.actor.strategy=fsdp",), "fsdp", "serves actor_rollout_ref.actor.strategy=fsdp2 and deep"),
        (("actor_rollout_ref.actor.fsdp_config.fsdp_size=2", "trainer.n_gpus_per_node=4"), "fsdp", "leave it at -1"),
        (("actor_rollout_ref.actor.fsdp_config.offload_policy=true",), "fsdp", "CPU offload"),
        (("rl_accel.comm.local_size=3",), "deepspeed", "does not divide the 2 ranks"),
        (("rl_accel.comm.inter_bits=3",), "deepspeed", "4, 8 or 16"),
        (("rl_accel.comm.hadamrd=false",), "deepspeed", "Did you mean 'hadamard'"),
        (("rl_accel.deepspeed.zero_stage=3", "rl_accel.comm.gradients=false"), "deepspeed", "zero_stage=2"),
        (("rl_accel.deepspeed.zero_stage=3", "rl_accel.comm.check_every=2"), "deepspeed", "check_every needs"),
        (("rl_accel.comm.check_every=2",), "fsdp", "check_every needs 4-bit weights, which FSDP2"),
    ],
)
def test_communication_that_could_not_work_is_refused(make_config, overrides, trainer, message):
    with pytest.raises(ConfigError, match=message):
        prepare(make_config(*COMM, *overrides, trainer=trainer))


def test_without_our_block_the_checks_run_too(make_config):
    config = make_config("actor_rollout_ref.model.lora_rank=8")
    with open_dict(config):
        config.actor_rollout_ref.rollout.custom = None
    with pytest.raises(ConfigError, match="LoRA"):
        prepare(config)


@pytest.mark.parametrize(("found", "message"), [(None, "it is not installed"), ("0.18.0", "installed is 0.18.0")])
def test_deepspeed_must_be_there_in_the_tested_version(make_config, monkeypatch, found, message):
    stock = versions.installed
    monkeypatch.setattr(versions, "installed", lambda name: found if name == "deepspeed" else stock(name))
    with pytest.raises(VersionError, match=message):
        prepare(make_config())
    prepare(make_config(trainer="fsdp"))


def test_two_ranks_need_more_memory_than_one(make_config, monkeypatch):
    from rl_accel.hosts.verl import checks

    free = checks.MIN_FREE_MEMORY_CPU + (1 << 30)
    monkeypatch.setattr(checks.psutil, "virtual_memory", lambda: type("Memory", (), {"available": free}))
    prepare(make_config(trainer="fsdp"))
    with pytest.raises(ConfigError, match="10 GiB of free memory"):
        prepare(make_config())


def test_a_configuration_without_the_strategy_stays_as_it_is(make_config):
    config = without_our_block(make_config(trainer="fsdp"))
    before = OmegaConf.to_yaml(config)
    prepare(config)
    assert OmegaConf.to_yaml(config) == before


def test_verl_knows_the_engine_and_deepspeed_is_not_imported_for_it():
    code = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "from verl.workers.engine import EngineRegistry\n"
        "for model_type in ('language_model', 'value_model'):\n"
        "    print(EngineRegistry.get_engine_cls(model_type, 'deepspeed').__name__)\n"
        "print('deepspeed' in sys.modules)"
    )
    env = {**os.environ, "VERL_PLATFORM": "cpu"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert result.stdout.split() == ["DeepSpeedEngineWithLMHead", "DeepSpeedEngineWithValueHead", "False"]


def test_a_lossy_feature_has_to_be_permitted(make_config):
    with pytest.raises(ConfigError, match=r"rl_accel\.comm .* is lossy.*rl_accel\.allow_lossy=true"):
        prepare(make_config("rl_accel.comm.enable=true"))
