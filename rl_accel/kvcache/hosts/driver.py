"""The quantized KV cache before a run starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rl_accel import machine
from rl_accel.errors import ConfigError
from rl_accel.feature import Driver
from rl_accel.hosts import versions
from rl_accel.hosts.verl import model_files
from rl_accel.kernels.kv_int4.layout import LANES
from rl_accel.kvcache import policies
from rl_accel.kvcache.config import DTYPE, MIN_VLLM, skip_layers


class KVCacheDriver(Driver):
    """Asks vLLM for the pages. Acts on plain commands, too: they may ask stock vLLM for what it cannot do."""

    always = True

    def check_engine_args(self, args: Mapping[str, Any], on_gpu: bool) -> None:
        if not self.settings.enabled and not on_gpu and args.get("kv_cache_dtype") == DTYPE:
            raise ConfigError(
                f"kv_cache_dtype={DTYPE}: vLLM's CPU build takes it without an error and writes garbage; use "
                "rl_accel.kvcache.enable=true rl_accel.allow_lossy=true instead"
            )

    def check(self, config: DictConfig) -> None:
        if not self.settings.enabled:
            return
        if versions.is_older("vllm", MIN_VLLM):
            raise ConfigError(
                f"rl_accel.kvcache.enable=true needs vLLM {'.'.join(map(str, MIN_VLLM))} or newer; installed is "
                f"{versions.installed('vllm')}"
            )
        policy = model_files.text_config(model_files.policy_config(config))
        if found := policies.unsupported(policy):
            raise ConfigError(f"rl_accel.kvcache.enable=true does not cover {found}, which the policy has")
        size = policies.head_size(policy)
        if self.settings.order and size % self.settings.order:
            raise ConfigError(
                f"rl_accel.kvcache.order={self.settings.order} does not divide the policy's head size of {size}"
            )
        block = OmegaConf.select(config, "actor_rollout_ref.rollout.engine_kwargs.vllm.block_size")
        if block and int(block) % LANES:
            raise ConfigError(f"engine_kwargs.vllm.block_size={block}: rl_accel.kvcache needs a multiple of {LANES}")
        stages = config.actor_rollout_ref.rollout.get("pipeline_model_parallel_size", 1) or 1
        if self.settings.measures and stages > 1:
            raise ConfigError(
                f"rl_accel.kvcache measures K on the whole policy; with pipeline_model_parallel_size={stages} set an "
                "order, such as rl_accel.kvcache.order=64, rl_accel.kvcache.balance=false and shift=false"
            )

    def engine_args(self) -> dict[str, Any]:
        if not self.settings.enabled:
            return {}
        layers = skip_layers(self.settings.int8_layers)
        asked: dict[str, Any] = {"kv_cache_dtype": DTYPE, "kv_cache_dtype_skip_layers": layers}
        if machine.has_gpu():
            asked["attention_backend"] = "CUSTOM"
        return asked

    def summary(self, config: DictConfig) -> str:
        return "INT4 KV cache (lossy)" if self.settings.enabled else ""

    def arm(self) -> str:
        return "int4kv" if self.settings.enabled else ""
