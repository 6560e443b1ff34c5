"""From settings to a verl configuration, the same for `rl_accel.train` and for a plain verl command.

`prepare(config)` reads the block `rl_accel`, which stands at the top of a configuration or, as verl's own place for
settings of others, under `actor_rollout_ref.rollout.custom`. Without that block nothing is changed, except by features
that a setting of verl's own asks for (`Driver.always`). With it, everything is checked first and then the configuration
is pointed at rl_accel's classes through the keys that verl offers for that. Nothing has been started by then.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from rl_accel.config import AccelConfig
from rl_accel.errors import ConfigError
from rl_accel.feature import Driver, features
from rl_accel.hosts import versions
from rl_accel.hosts.verl import ACTIVE_ENV, FOLDER, RUN_ENV, checks, cluster, model_files, training_roles

logger = logging.getLogger(__name__)

TRAINER_NAME = "rl_accel_sync"
BLOCK = "actor_rollout_ref.rollout.custom.rl_accel"
FORWARDED = (
    "RL_ACCEL_DEVICE",
    "TOKENIZERS_PARALLELISM",
    "VERL_FILE_LOGGER_PATH",
    "VERL_PLATFORM",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_LOGGING_LEVEL",
    "VLLM_NO_USAGE_STATS",
    "WANDB_DIR",
    "WANDB_MODE",
    "WANDB_RESUME",
    "WANDB_RUN_ID",
)
"""Variables of the driver that Ray's processes get too: those of a cluster have the environment of `ray start`."""
MANAGER_CLASS = "rl_accel.hosts.verl.agent_loop.IdentifiedAgentLoopManager"
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
        if accel_block(config) is not None and cluster.address(config):
            task_runner_class = cluster.RunnerOnThisNode(task_runner_class, config)
        return original(config, task_runner_class, *args, **kwargs)

    module.run_ppo = run_ppo


def _class_name(task_runner_class: Any) -> str:
    metadata = getattr(task_runner_class, "__ray_metadata__", None)
    return str(getattr(metadata, "class_name", getattr(task_runner_class, "__name__", task_runner_class)))


def drivers(accel: AccelConfig) -> list[Driver]:
    """Return the part of every feature that looks at configurations, also of those that are off."""
    return [feature.role("driver")(feature, accel.settings[name], accel) for name, feature in features().items()]


def preflight(config: DictConfig) -> AccelConfig:
    """Check everything that can be told from the configuration alone; changes nothing, takes milliseconds.

    Raises:
        ConfigError, VersionError: with the setting to change.
    """
    accel = AccelConfig.from_mapping(accel_block(config))
    versions.check()
    accel.check()
    checks.check_settings(config, drivers(accel))
    return accel


def check(config: DictConfig) -> AccelConfig:
    """Check everything, also files, folders and the machine; changes nothing.

    Raises:
        ConfigError, VersionError: with the setting to change.
    """
    accel = preflight(config)
    checks.check_run(config, drivers(accel))
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
        for driver in drivers(AccelConfig()):
            if driver.always:
                engine = OmegaConf.select(config, "actor_rollout_ref.rollout.engine_kwargs.vllm") or {}
                driver.check_engine_args(engine, on_gpu=config.trainer.get("device") != "cpu")
                driver.check(config)
                driver.prepare(config)
        return None
    accel = check(config)
    acting = drivers(accel)
    with open_dict(config):
        OmegaConf.update(config, BLOCK, block, force_add=True)
        _use_our_classes(config)
        _train_in_the_dtype_asked_for(config)
        _pass_settings_to_vllm(config, accel)
        for driver in acting:
            driver.prepare(config)
        _pass_settings_to_ranks(config, acting)
        _set_worker_environment(config, accel)
    return accel


def _use_our_classes(config: DictConfig) -> None:
    config.trainer.v1.trainer_mode = TRAINER_NAME
    _set_if_free(config, "actor_rollout_ref.rollout.agent.agent_loop_manager_class", MANAGER_CLASS)
    _set_if_free(config, "actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls", WORKER_EXTENSION)


def _train_in_the_dtype_asked_for(config: DictConfig) -> None:
    """verl's FSDP engine computes in bf16 unless mixed_precision says otherwise, also with dtype=float32."""
    for role in training_roles.NODES:
        fsdp = training_roles.node(config, role)
        if fsdp is not None and fsdp.get("dtype") == "float32" and fsdp.get("mixed_precision") is None:
            fsdp.mixed_precision = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}


def _pass_settings_to_vllm(config: DictConfig, accel: AccelConfig) -> None:
    engine = config.actor_rollout_ref.rollout.engine_kwargs.vllm
    additional: Any = OmegaConf.to_container(engine.get("additional_config") or OmegaConf.create({}), resolve=True)
    additional["rl_accel"] = engine_settings(accel)
    engine.additional_config = additional
    policy = model_files.text_config(model_files.policy_config(config))
    folder = Path(os.path.abspath(config.trainer.default_local_dir)) / FOLDER
    for name, (value, feature) in engine_args(accel, policy, folder).items():
        if engine.get(name):
            raise ConfigError(f"rl_accel.{feature} and engine_kwargs.vllm.{name} are both set; keep one")
        engine[name] = value


def engine_settings(accel: AccelConfig) -> dict[str, Any]:
    """Return what rollout engines need of the settings, as plain values: `additional_config["rl_accel"]`."""
    acting = [driver for driver in drivers(accel) if driver.feature.engine and driver.settings.enabled]
    permitted = {"allow_lossy": True} if accel.run.allow_lossy else {}
    return {**permitted, **{driver.feature.name: driver.engine_settings() for driver in acting}}


def engine_args(
    accel: AccelConfig, policy: Mapping[str, Any] | None = None, folder: Path | None = None
) -> dict[str, tuple[Any, str]]:
    """Return arguments of vLLM's engine that features ask for: name -> value, feature.

    Args:
        policy: config.json of the policy, of its text model; for features that write files for the engine.
        folder: in which they do so, each under its name. None: nothing is written, and such features ask for nothing.

    Raises:
        ConfigError: for files that cannot be made.
    """
    found: dict[str, tuple[Any, str]] = {}
    for driver in drivers(accel):
        if driver.settings.enabled:
            given = driver.engine_args()
            given |= driver.engine_files(policy or {}, folder / driver.feature.name) if folder is not None else {}
            found |= {name: (value, driver.feature.name) for name, value in given.items()}
    return found


def _pass_settings_to_ranks(config: DictConfig, acting: list[Driver]) -> None:
    for driver in acting:
        for role in training_roles.NODES if driver.feature.rank and driver.settings.enabled else ():
            if settings := driver.rank_settings(config, role):
                training_roles.give(config, role, driver.feature.name, settings)


def _needs_v1_runner(config: DictConfig, accel: AccelConfig) -> bool:
    """Some features, and the counters and self-test of whatever speculates, fit vLLM's V1 model runner only."""
    mtp = OmegaConf.select(config, "actor_rollout_ref.model.mtp") or {}
    speculates = config.actor_rollout_ref.rollout.engine_kwargs.vllm.get("speculative_config")
    fits = all("V2" in feature.model_runners for feature in accel.enabled() if feature.engine)
    return not fits or bool(speculates) or bool(mtp.get("enable") and mtp.get("enable_rollout"))


def _set_worker_environment(config: DictConfig, accel: AccelConfig) -> None:
    """Ray processes of this run load the hooks (`plugin.py`), also on the nodes of an existing cluster."""
    forwarded = {name: os.environ[name] for name in FORWARDED if name in os.environ}
    ray_init = config.ray_kwargs.ray_init
    runtime_env: Any = OmegaConf.to_container(ray_init.get("runtime_env") or OmegaConf.create({}), resolve=True)
    ours = {ACTIVE_ENV: ",".join(feature.name for feature in accel.enabled()), RUN_ENV: os.urandom(4).hex()}
    if _needs_v1_runner(config, accel):
        ours["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        logger.info(
            "rollouts run on vLLM's V1 model runner, which exact sampling and speculation need; this gives up V2, "
            "vLLM's default for dense models on a GPU"
        )
    runtime_env["env_vars"] = {**runtime_env.get("env_vars", {}), **forwarded, **ours}
    ray_init.runtime_env = runtime_env


def _set_if_free(config: DictConfig, key: str, value: str) -> None:
    current = OmegaConf.select(config, key)
    if current not in (None, value):
        raise ConfigError(f"rl_accel needs {key}={value}; it is set to {current}")
    OmegaConf.update(config, key, value, force_add=True)
