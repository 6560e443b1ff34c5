"""From settings to a verl configuration, the same for `rl_accel.train` and for a plain verl command.

`prepare(config)` reads the block `rl_accel`, which stands at the top of a configuration or, as verl's own place for
settings of others, under `actor_rollout_ref.rollout.custom`. Without that block nothing is changed, except that
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
from rl_accel.hosts.verl import checks, deepspeed_checks, deepspeed_settings, model_files
from rl_accel.hosts.verl.patches import RUN_ENV

logger = logging.getLogger(__name__)

TRAINER_NAME = "rl_accel_sync"
BLOCK = "actor_rollout_ref.rollout.custom.rl_accel"
MANAGER_CLASS = "rl_accel.hosts.verl.agent_loop.IdentifiedAgentLoopManager"
DAS_PROPOSER = "rl_accel.hosts.vllm.das.DASProposer"
WORKER_EXTENSION = "rl_accel.hosts.verl.worker_extension.AcceleratedWorkerExtension"


def accel_block(config: DictConfig) -> dict[str, Any] | None:
    """Return the rl_accel block as plain values, or None.

    Raises:
        ConfigError: if it is no group of settings, or stands in both places with different values.
    """
    found = []
    for place in (BLOCK, "rl_accel"):
        block = OmegaConf.select(config, place)
        if block is None:
            continue
        if not isinstance(block, DictConfig):
            raise ConfigError(f"{place} must be a group of settings; got {block!r}")
        found.append(OmegaConf.to_container(block, resolve=True))
    if len(found) == 2 and found[0] != found[1]:
        raise ConfigError(f"rl_accel settings stand at the top and under {BLOCK}, and they differ; keep one place")
    return found[0] if found else None  # type: ignore[return-value]


def hook_validate_config(module) -> None:
    """Wrap `verl.utils.config.validate_config`, which verl's own entry calls in the driver before it starts Ray."""
    original = module.validate_config

    @functools.wraps(original)
    def validate_config(config, *args, **kwargs):
        prepare(config)
        return original(config, *args, **kwargs)

    module.validate_config = validate_config


def hook_run_ppo(module) -> None:
    """Wrap `verl.trainer.main_ppo.run_ppo`, through which the entries that do not validate go as well.

    Those are the fully asynchronous and the one-step-off trainer: they bring task runners of their own.
    """
    original = module.run_ppo

    @functools.wraps(original)
    def run_ppo(config, task_runner_class, *args, **kwargs):
        if task_runner_class is not module.TaskRunnerV1 and accel_block(config) is not None:
            raise ConfigError(
                "rl_accel is set, and it drives verl's synchronous V1 trainer only (python -m verl.trainer.main_ppo), "
                f"not {_class_name(task_runner_class)}. Remove the rl_accel block, or use that trainer"
            )
        return original(config, task_runner_class, *args, **kwargs)

    module.run_ppo = run_ppo


def _class_name(task_runner_class: Any) -> str:
    metadata = getattr(task_runner_class, "__ray_metadata__", None)
    return str(getattr(metadata, "class_name", getattr(task_runner_class, "__name__", task_runner_class)))


def preflight(config: DictConfig) -> AccelConfig:
    """Check everything that can be told from the configuration alone; changes nothing, takes milliseconds.

    Raises:
        ConfigError, VersionError: with the setting to change.
    """
    accel = AccelConfig.from_mapping(accel_block(config))
    versions.check()
    checks.check_settings(config, accel)
    return accel


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
        OmegaConf.update(config, BLOCK, block, force_add=True)
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
    if rollout.max_model_len is not None and not engine.get("max_model_len"):
        engine.max_model_len = _length_with_a_draft(config, accel.draft.max_draft)


def _length_with_a_draft(config: DictConfig, max_draft: int) -> int:
    """Return the context length of the engine, in tokens.

    vLLM stops drafting for the whole batch while one request is within a draft of it. So the engine gets a draft more
    than the user's `max_model_len`, by which verl goes on limiting responses: they are as long as without drafts. A
    model without room for it, or whose files are not here to ask, keeps the user's length and drafts less at its end.
    """
    asked = config.actor_rollout_ref.rollout.max_model_len
    return max(asked, min(asked + max_draft, model_files.max_position_embeddings(config) or asked))


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
    ours = {"RL_ACCEL_ACTIVE": "1", RUN_ENV: os.urandom(4).hex()}
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
