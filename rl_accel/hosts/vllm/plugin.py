"""Entry point of the group `vllm.general_plugins`: runs in every vLLM process and decides whether rl_accel
acts there.

`register()` lets features make their names known to vLLM, and arranges that `load_model` of vLLM's model runners calls
`install` first. `install` returns at once unless `vllm_config.additional_config["rl_accel"]` is a dict, so vLLM without
rl_accel settings stays as it is. `load_model` is the hook because it runs once, after every constructor:
`CPUModelRunner.__init__` replaces device tensors and kernels after `GPUModelRunner.__init__` has returned.

Host symbols: `GPUModelRunner.load_model` (v1/worker/gpu_model_runner.py), `CPUModelRunner.load_model`
(v1/worker/cpu_model_runner.py, does not call the former), and `GPUModelRunner.load_model` of the V2 runner
(v1/worker/gpu/model_runner.py), whose sampler has another interface.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import wrapt

from rl_accel.config import AccelConfig
from rl_accel.errors import NotLiveError
from rl_accel.feature import Engine, Feature, features, load
from rl_accel.hosts.vllm.faults import Faults

logger = logging.getLogger(__name__)

CONFIG_KEY = "rl_accel"
"""Where rl_accel's settings live in vLLM's `additional_config`."""

_RUNNERS = {
    "vllm.v1.worker.gpu_model_runner": "GPUModelRunner",
    "vllm.v1.worker.cpu_model_runner": "CPUModelRunner",
}
_V2_RUNNER = ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner")
_registered = False


def register() -> None:
    """Install the hooks; idempotent, imports nothing of vLLM or torch."""
    global _registered
    if _registered:
        return
    _registered = True
    keep_warnings()
    for feature in features().values():
        if feature.register:
            load(feature.register)()
    for module, name in _RUNNERS.items():
        wrapt.register_post_import_hook(_wrapping(f"{name}.load_model", _install_then_load("V1")), module)
    module, name = _V2_RUNNER
    wrapt.register_post_import_hook(_wrapping(f"{name}.load_model", _install_then_load("V2")), module)


def keep_warnings() -> None:
    """Let our warnings through where the root logger keeps errors only: vLLM's command `serve` makes it so."""
    ours = logging.getLogger("rl_accel")
    if ours.getEffectiveLevel() > logging.WARNING:
        ours.setLevel(logging.WARNING)


def install(runner: Any, config: Mapping[str, Any], model_runner: str = "V1") -> None:
    """Bring up what the settings ask for on one model runner.

    Sets on the runner: `rl_accel`, feature -> its `Engine`; `rl_accel_spec_stats`, a `SpecDecodeCounter`, or None
    without speculation; `rl_accel_faults` (`Faults`); and `rl_accel_live`, a dict that says what came up.

    Args:
        runner: a constructed model runner, before its model is loaded.
        config: settings as `AccelConfig.from_mapping` reads them, of the features that act in engines.
        model_runner: vLLM's generation of it.

    Raises:
        ConfigError: if a setting is not known or has the wrong type or range, or contradicts vLLM's.
        NotLiveError: if a feature that was asked for cannot act on this runner.
        SpeculationUnsafeError: if speculative decoding would not sample from the target.
    """
    accel = AccelConfig.from_mapping(_with_implied(config, runner.vllm_config))
    accel.check()
    wanted = [feature for feature in accel.enabled() if feature.engine]
    live: dict[str, Any] = {"model_runner": model_runner, "repairs": [], "self_test": "not needed", "features": {}}
    runner.rl_accel, runner.rl_accel_spec_stats, runner.rl_accel_faults = {}, None, Faults()
    _refuse(model_runner, wanted, runner.vllm_config)
    for feature in wanted:
        role: Engine = feature.role("engine")(accel.settings[feature.name], runner.vllm_config)
        runner.rl_accel[feature.name] = role
    verifies = model_runner == "V1" and hasattr(runner, "rejection_sampler")  # only on the last pipeline rank
    if verifies or (any(feature.samples for feature in wanted) and not runner.is_pooling_model):
        live["repairs"] = _repair(runner, verifies)
    for role in runner.rl_accel.values():
        role.install(runner)
    if verifies:
        from rl_accel.hosts.vllm import spec_stats
        from rl_accel.hosts.vllm.self_test import self_test

        self_test(runner.rejection_sampler, runner.device)
        live["self_test"] = "passed"
        runner.rl_accel_spec_stats = spec_stats.install(runner)
    for role in runner.rl_accel.values():
        role.installed(runner)
    runner.rl_accel_live = live


def loaded(runner: Any) -> None:
    """Let features look at the loaded model, and write down what is live.

    Raises:
        NotLiveError: if what was asked for is not in force.
    """
    live = runner.rl_accel_live
    if getattr(getattr(runner, "device", None), "type", "") == "cpu":
        live["repairs"] = live["repairs"] + _prepare_syncs_on_cpu(runner)
    for role in runner.rl_accel.values():
        role.loaded(runner)
    live["features"] = {name: role.live() for name, role in runner.rl_accel.items()}
    logger.info("rl_accel on %s: %s", type(runner).__name__, live)


def settings(vllm_config: Any) -> Mapping[str, Any] | None:
    """Return rl_accel's settings from a VllmConfig, or None if it has none."""
    additional = getattr(vllm_config, "additional_config", None)
    found = additional.get(CONFIG_KEY) if isinstance(additional, dict) else None
    return found if isinstance(found, dict) else None


def _repair(runner: Any, verifies: bool) -> list[str]:
    from rl_accel.hosts.vllm import mask_repair, runner_repair

    repaired = []
    if verifies:
        from rl_accel.hosts.vllm import cpu_repair

        repaired += cpu_repair.repair_if_needed(runner.device)
    return repaired + mask_repair.repair_if_needed() + runner_repair.repair_if_needed(runner)


def _prepare_syncs_on_cpu(runner: Any) -> list[str]:
    """Once the model is there, which tells whether it has experts, and before weights are loaded again."""
    from rl_accel.hosts.vllm import moe_repair, packing

    packing.remember_threads(runner)
    return moe_repair.repair_if_needed(runner.model)


def _implied(vllm_config: Any) -> dict[str, Mapping[str, Any]]:
    """Return the features that vLLM's own settings ask for, with the settings that follow."""
    model = str(getattr(getattr(vllm_config, "speculative_config", None), "model", None))
    return {name: f.speculators[model] for name, f in features().items() if model in f.speculators}


def _with_implied(config: Mapping[str, Any], vllm_config: Any) -> dict[str, Any]:
    implied = _implied(vllm_config)
    return {**config, **{name: {**values, **config.get(name, {})} for name, values in implied.items()}}


def _refuse(model_runner: str, wanted: list[Feature], vllm_config: Any) -> None:
    """Raise NotLiveError if a feature, or the counting of drafts, does not fit this generation of the model runner."""
    unfit = [feature.title for feature in wanted if model_runner not in feature.model_runners]
    if model_runner != "V1" and vllm_config.speculative_config is not None:
        unfit.append("counting of drafts")
    if unfit:
        raise NotLiveError(
            f"rl_accel's {', '.join(unfit)} need vLLM's V1 model runner, and vLLM chose {model_runner}, its default "
            "for dense models on GPU; set VLLM_USE_V2_MODEL_RUNNER=0 in the environment of the engine"
        )


def _wrapping(symbol: str, wrapper: Callable[..., Any]) -> Callable[[Any], Any]:
    return lambda module: wrapt.wrap_function_wrapper(module, symbol, wrapper)


def _install_then_load(model_runner: str) -> Callable[..., Any]:
    def wrapper(load_model: Callable[..., Any], runner: Any, args: tuple, kwargs: dict) -> Any:
        config = settings(runner.vllm_config)
        if config is None and _implied(runner.vllm_config):
            config = {}  # `vllm serve --speculative-config`: a drafter of ours without any other setting
        if config is None or hasattr(runner, "rl_accel_live"):
            return load_model(*args, **kwargs)
        install(runner, config, model_runner)
        result = load_model(*args, **kwargs)
        loaded(runner)
        return result

    return wrapper
