"""Entry point of the group `vllm.general_plugins`: runs in every vLLM process and decides whether rl_accel
acts there.

`register()` only arranges that `load_model` of vLLM's model runners calls `install` first. `install` returns
at once unless `vllm_config.additional_config["rl_accel"]` is a dict, so vLLM without rl_accel settings stays
as it is. `load_model` is the seam because it runs once, after every constructor: `CPUModelRunner.__init__`
replaces device tensors and kernels after `GPUModelRunner.__init__` has returned.

Host symbols: `GPUModelRunner.load_model` (v1/worker/gpu_model_runner.py), `CPUModelRunner.load_model`
(v1/worker/cpu_model_runner.py, does not call the former), and `GPUModelRunner.load_model` of the V2 runner
(v1/worker/gpu/model_runner.py), where rl_accel refuses: its sampler has another interface.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import wrapt

from rl_accel.errors import ConfigError, NotLiveError
from rl_accel.hosts.vllm.faults import Faults

logger = logging.getLogger(__name__)

DAS_PROPOSER = "rl_accel.hosts.vllm.das.DASProposer"
CONFIG_KEY = "rl_accel"
"""Where rl_accel's settings live in vLLM's `additional_config`."""

_RUNNERS = {
    "vllm.v1.worker.gpu_model_runner": "GPUModelRunner",
    "vllm.v1.worker.cpu_model_runner": "CPUModelRunner",
}
NOTHING_LIVE = {
    "model_runner": "V1",
    "exact_sampling": False,
    "cpu_repair": False,
    "repairs": [],
    "spec_stats": False,
    "das": False,
    "self_test": "not needed",
}
"""What came up in an engine, before anything has."""
_V2_RUNNER = ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner")
_registered = False


def register() -> None:
    """Install the hooks; idempotent, imports nothing of vLLM or torch."""
    global _registered
    if _registered:
        return
    _registered = True
    for module, name in _RUNNERS.items():
        wrapt.register_post_import_hook(_wrapping(f"{name}.load_model", _install_then_load), module)
    module, name = _V2_RUNNER
    wrapt.register_post_import_hook(_wrapping(f"{name}.load_model", _refuse_v2), module)


def install(runner: Any, config: Mapping[str, Any]) -> None:
    """Bring up what the settings ask for on one V1 model runner.

    Sets on the runner: `rl_accel_spec_stats` (a `SpecDecodeCounter`, or None without speculation),
    `rl_accel_faults` (`Faults`) and `rl_accel_live`, a dict that says what came up.

    Args:
        runner: a constructed GPUModelRunner or subclass, before its model is loaded.
        config: `{"sampling": {"exact": bool, "seed": int}, "draft": {"method": str}}`; other keys are not
            ours to judge.

    Raises:
        ConfigError: if a setting has the wrong type, or contradicts vLLM's.
        NotLiveError: if a draft method was asked for and vLLM does not speculate.
        SpeculationUnsafeError: if speculative decoding would not sample from the target.
    """
    exact, seed, draft_method = _read(config)
    speculating = runner.speculative_config is not None
    if draft_method != "none" and not speculating:
        raise NotLiveError(
            f"rl_accel.draft.method is {draft_method!r}, but vLLM was started without speculative_config; "
            "pass one, or set rl_accel.draft.method=none"
        )
    verifies = hasattr(runner, "rejection_sampler")  # only on the last pipeline rank
    live: dict[str, Any] = dict(NOTHING_LIVE)
    runner.rl_accel_spec_stats, runner.rl_accel_faults = None, Faults()
    if verifies or (exact and not runner.is_pooling_model):
        from rl_accel.hosts.vllm import mask_repair, runner_repair

        live["repairs"] = mask_repair.repair_if_needed() + runner_repair.repair_if_needed(runner)
    if verifies:
        from rl_accel.hosts.vllm import cpu_repair

        live["cpu_repair"] = cpu_repair.repair_if_needed(runner.device)
    if exact and not runner.is_pooling_model:
        from rl_accel.hosts.vllm import exact_sampler

        exact_sampler.install(runner, seed)
        live["exact_sampling"] = True
    if verifies:
        from rl_accel.hosts.vllm import spec_stats
        from rl_accel.hosts.vllm.self_test import self_test

        self_test(runner.rejection_sampler, runner.device)
        live["self_test"] = "passed"
        runner.rl_accel_spec_stats = spec_stats.install(runner)
        live["spec_stats"] = True
        if _drafts_by_das(runner.vllm_config):
            runner.drafter.attach(runner)
            live["das"] = True
        elif draft_method == "das":
            raise NotLiveError(
                f"rl_accel.draft.method is 'das', but speculative_config names another drafter; its model must be "
                f"{DAS_PROPOSER}"
            )
    runner.rl_accel_live = live
    logger.info("rl_accel on %s: %s", type(runner).__name__, live)


def settings(vllm_config: Any) -> Mapping[str, Any] | None:
    """Return rl_accel's settings from a VllmConfig, or None if it has none."""
    additional = getattr(vllm_config, "additional_config", None)
    found = additional.get(CONFIG_KEY) if isinstance(additional, dict) else None
    return found if isinstance(found, dict) else None


def _drafts_by_das(vllm_config: Any) -> bool:
    speculative = getattr(vllm_config, "speculative_config", None)
    return speculative is not None and getattr(speculative, "model", None) == DAS_PROPOSER


def _wrapping(symbol: str, wrapper: Callable[..., Any]) -> Callable[[Any], Any]:
    return lambda module: wrapt.wrap_function_wrapper(module, symbol, wrapper)


def _install_then_load(load_model: Callable[..., Any], runner: Any, args: tuple, kwargs: dict) -> Any:
    config = settings(runner.vllm_config)
    if config is None and _drafts_by_das(runner.vllm_config):
        config = {}  # `vllm serve --speculative-config`: our drafter without any other setting
    if config is not None and not hasattr(runner, "rl_accel_live"):
        install(runner, config)
    return load_model(*args, **kwargs)


def _refuse_v2(load_model: Callable[..., Any], runner: Any, args: tuple, kwargs: dict) -> Any:
    config = settings(runner.vllm_config)
    if config is not None:
        exact, _, draft_method = _read(config)
        if exact or draft_method != "none" or runner.vllm_config.speculative_config is not None:
            raise NotLiveError(
                "rl_accel's sampling and drafting need vLLM's V1 model runner, and vLLM chose V2, its "
                "default for dense models on GPU; set VLLM_USE_V2_MODEL_RUNNER=0 in the environment of the "
                "engine"
            )
        runner.rl_accel_live = {**NOTHING_LIVE, "model_runner": "V2"}
    return load_model(*args, **kwargs)


def _read(config: Mapping[str, Any]) -> tuple[bool, int, str]:
    sampling, draft = config.get("sampling") or {}, config.get("draft") or {}
    exact, seed, method = sampling.get("exact", False), sampling.get("seed", 0), draft.get("method", "none")
    for name, value, kind in (
        ("sampling.exact", exact, bool),
        ("sampling.seed", seed, int),
        ("draft.method", method, str),
    ):
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(f"rl_accel.{name} must be {kind.__name__}; got {value!r}")
    return exact, seed, method
