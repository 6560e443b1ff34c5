"""From settings to a verl configuration, the same for `rl_accel.train` and for a plain verl command.

`prepare(config)` reads `actor_rollout_ref.rollout.custom.rl_accel`. Without that block nothing is changed, except that
`strategy=deepspeed`, which names an engine of ours, is checked and given its settings. With it, everything is checked
first and then the configuration is pointed at rl_accel's classes through the keys that verl offers for that. Nothing
has been started by then.
"""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from rl_accel.config import AccelConfig, CommConfig, DeepSpeedConfig
from rl_accel.errors import ConfigError
from rl_accel.hosts import versions
from rl_accel.hosts.verl import checks, deepspeed_checks, deepspeed_settings

logger = logging.getLogger(__name__)

TRAINER_NAME = "rl_accel_sync"
BLOCK = "actor_rollout_ref.rollout.custom.rl_accel"
MANAGER_CLASS = "rl_accel.hosts.verl.agent_loop.IdentifiedAgentLoopManager"
DAS_PROPOSER = "rl_accel.hosts.vllm.das.DASProposer"
WORKER_EXTENSION = "rl_accel.hosts.verl.worker_extension.AcceleratedWorkerExtension"


def accel_block(config: DictConfig) -> dict[str, Any] | None:
    """Return the block `actor_rollout_ref.rollout.custom.rl_accel` as plain values, or None."""
    block = OmegaConf.select(config, BLOCK)
    return None if block is None else OmegaConf.to_container(block, resolve=True)  # type: ignore[return-value]


def hook_validate_config(module) -> None:
    """Wrap `verl.utils.config.validate_config`, which verl's own entry calls in the driver before it starts Ray."""
    original = module.validate_config

    @functools.wraps(original)
    def validate_config(config, *args, **kwargs):
        prepare(config)
        return original(config, *args, **kwargs)

    module.validate_config = validate_config


def prepare(config: DictConfig) -> AccelConfig | None:
    """Check a verl configuration and switch on what its rl_accel block asks for, in place.

    Returns:
        The settings, or None if the configuration has no rl_accel block.

    Raises:
        ConfigError, VersionError: before anything was started or changed.
    """
    block = accel_block(config)
    if block is None:
        deepspeed_checks.check(config, DeepSpeedConfig(), asked_for=False)
        deepspeed_settings.apply(config, DeepSpeedConfig(), CommConfig())
        return None
    accel = AccelConfig.from_mapping(block)
    versions.check()
    checks.check(config, accel)
    deepspeed_settings.apply(config, accel.deepspeed, accel.comm)
    with open_dict(config):
        _use_our_classes(config)
        _train_in_the_dtype_asked_for(config)
        _pass_settings_to_vllm(config, accel)
        _set_worker_environment(config, accel)
    return accel


def _use_our_classes(config: DictConfig) -> None:
    config.trainer.v1.trainer_mode = TRAINER_NAME
    _set_if_free(config, "actor_rollout_ref.rollout.agent.agent_loop_manager_class", MANAGER_CLASS)
    _set_if_free(config, "actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls", WORKER_EXTENSION)


def _train_in_the_dtype_asked_for(config: DictConfig) -> None:
    """verl's FSDP engine computes in bf16 unless mixed_precision says otherwise, also with dtype=float32."""
    for role, node in deepspeed_checks.ROLES.items():
        fsdp = OmegaConf.select(config, f"{role}.{node}")
        if fsdp is not None and fsdp.get("dtype") == "float32" and fsdp.get("mixed_precision") is None:
            fsdp.mixed_precision = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}


def _pass_settings_to_vllm(config: DictConfig, accel: AccelConfig) -> None:
    rollout = config.actor_rollout_ref.rollout
    engine = rollout.engine_kwargs.vllm
    additional = OmegaConf.to_container(engine.get("additional_config") or OmegaConf.create({}), resolve=True)
    additional["rl_accel"] = {
        "sampling": {"exact": accel.sampling.exact, "seed": accel.sampling.seed},
        "draft": draft_settings(accel),
        "sync": {"readback": accel.sync.readback},
    }
    engine.additional_config = additional
    speculative = speculative_config(accel)
    if speculative is None:
        return
    if engine.get("speculative_config"):
        raise ConfigError(
            f"rl_accel.draft.method={accel.draft.method} and engine_kwargs.vllm.speculative_config are both set; "
            "keep one"
        )
    engine.speculative_config = speculative
    if rollout.max_model_len is not None:
        # Near the end of the context vLLM stops drafting for the whole batch; leave room for one more draft.
        rollout.max_model_len += accel.draft.max_draft


def draft_settings(accel: AccelConfig) -> dict[str, Any]:
    """Return what the engine needs of `rl_accel.draft`, as plain values."""
    if accel.draft.method != "das":
        return {"method": accel.draft.method}
    return {name: value for name, value in asdict(accel.draft).items() if name not in ("record",)}


def speculative_config(accel: AccelConfig) -> dict[str, Any] | None:
    """Return vLLM's `speculative_config` for the chosen method, or None."""
    draft = accel.draft
    if draft.method == "none":
        return None
    if draft.method == "das":
        return {"model": DAS_PROPOSER, "num_speculative_tokens": draft.max_draft}
    common = {"method": draft.method, "num_speculative_tokens": draft.max_draft}
    if draft.method == "ngram":
        return {
            **common,
            "prompt_lookup_min": draft.prompt_lookup_min,
            "prompt_lookup_max": draft.prompt_lookup_max,
        }
    return common


def _needs_v1_runner(config: DictConfig, accel: AccelConfig) -> bool:
    """Our sampler, and the counters and self-test of whatever speculates, fit vLLM's V1 model runner only."""
    mtp = OmegaConf.select(config, "actor_rollout_ref.model.mtp") or {}
    speculates = config.actor_rollout_ref.rollout.engine_kwargs.vllm.get("speculative_config")
    return accel.sampling.exact or bool(speculates) or bool(mtp.get("enable") and mtp.get("enable_rollout"))


def _set_worker_environment(config: DictConfig, accel: AccelConfig) -> None:
    """Ray processes of this run load the hooks (`plugin.py`), also on the nodes of an existing cluster."""
    forwarded = {
        name: os.environ[name]
        for name in (
            "VERL_PLATFORM",
            "VLLM_CPU_KVCACHE_SPACE",
            "VLLM_ENABLE_V1_MULTIPROCESSING",
            "VERL_FILE_LOGGER_PATH",
            "WANDB_DIR",
            "WANDB_RUN_ID",
        )
        if name in os.environ
    }
    ray_init = config.ray_kwargs.ray_init
    runtime_env = OmegaConf.to_container(ray_init.get("runtime_env") or OmegaConf.create({}), resolve=True)
    ours = {"RL_ACCEL_ACTIVE": "1"}
    if _needs_v1_runner(config, accel):
        ours["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        logger.info(
            "rollouts run on vLLM's V1 model runner, which exact sampling and drafting need; this gives up V2, vLLM's "
            "default for dense models on a GPU"
        )
    runtime_env["env_vars"] = {**runtime_env.get("env_vars", {}), **forwarded, **ours}
    ray_init.runtime_env = runtime_env


def _set_if_free(config: DictConfig, key: str, value: str) -> None:
    current = OmegaConf.select(config, key)
    if current not in (None, value):
        raise ConfigError(f"rl_accel needs {key}={value}; it is set to {current}")
    OmegaConf.update(config, key, value, force_add=True)
