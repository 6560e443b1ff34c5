"""The quantized KV cache in a rollout engine: that every layer has it, and what it is set to."""

from __future__ import annotations

import time
from typing import Any

import torch

from rl_accel.errors import NotLiveError
from rl_accel.feature import Engine
from rl_accel.hosts import versions
from rl_accel.kvcache import policies
from rl_accel.kvcache.config import DTYPE, MIN_VLLM, skip_layers
from rl_accel.kvcache.hosts import measuring
from rl_accel.kvcache.hosts.layers import QuantizedPages, attention_layers, token_bytes
from rl_accel.kvcache.hosts.pending import PendingRotations
from rl_accel.kvcache.hosts.register import CpuOverride
from rl_accel.kvcache.rotation import Rotation, choose_rotation


class KVCacheEngine(Engine):
    """Checks, measures and counts; the work is in `vllm_cpu.py` and `vllm_gpu.py`."""

    def __init__(self, settings: Any, vllm_config: Any):
        """
        Raises:
            NotLiveError: if vLLM is too old, was not asked for the pages, or the policy has attention that they do not
                serve.
        """
        super().__init__(settings, vllm_config)
        if versions.is_older("vllm", MIN_VLLM):
            raise NotLiveError(
                f"rl_accel.kvcache.enable=true needs vLLM {'.'.join(map(str, MIN_VLLM))} or newer; this is "
                f"{versions.installed('vllm')}"
            )
        cache, wanted = vllm_config.cache_config, skip_layers(settings.int8_layers)
        if cache.cache_dtype != DTYPE or sorted(cache.kv_cache_dtype_skip_layers) != sorted(wanted):
            raise NotLiveError(
                f"rl_accel.kvcache.enable=true needs vLLM's kv_cache_dtype={DTYPE} and kv_cache_dtype_skip_layers="
                f"{wanted} (its layers in 8 bits); the engine was given {cache.cache_dtype} and "
                f"{list(cache.kv_cache_dtype_skip_layers)}"
            )
        if found := policies.unsupported(vllm_config.model_config.hf_text_config.to_dict()):
            raise NotLiveError(f"rl_accel.kvcache does not cover {found}, which this policy has; set enable=false")
        if settings.measures and vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise NotLiveError(
                "rl_accel.kvcache measures K on the whole policy; with pipeline_parallel_size > 1 set an order, as "
                "order=64, and balance=false shift=false"
            )
        self._runner: Any = None
        self._override: CpuOverride | None = None
        self._layers: dict[str, Any] = {}
        self._measured: list[float] = []
        self._rotations = PendingRotations()

    def install(self, runner: Any) -> None:
        self._runner = runner
        if runner.device.type == "cpu":
            self._override = CpuOverride()
            self._override.begin()

    def loaded(self, runner: Any) -> None:
        """
        Raises:
            NotLiveError: if a layer computes attention by anything else.
        """
        if self._override is not None:
            self._override.end()
        self._layers = dict(attention_layers(self.vllm_config))
        for name, layer in self._layers.items():
            self._check(name, layer)
        if not self._layers:
            raise NotLiveError("rl_accel.kvcache: this model has no attention layer whose KV cache vLLM manages")
        for impl, rotation in self._measure():
            impl.set_rotation(rotation)

    def _check(self, name: str, layer: Any) -> None:
        from vllm.v1.kv_cache_interface import AttentionSpec

        impl = layer.impl
        if not isinstance(impl, QuantizedPages):
            raise NotLiveError(
                f"rl_accel.kvcache is on, but {name} computes attention by {type(impl).__name__}, which cannot read "
                f"pages of {DTYPE}"
            )
        if impl.bits == 8:
            layer.attn_backend = layer.attn_backend.of_8_bits()
        spec = layer.get_kv_cache_spec(self.vllm_config)
        assert isinstance(spec, AttentionSpec)
        expected = token_bytes(impl.head_size, impl.bits)
        if (found := layer.attn_backend.customize_spec(spec).state_content_size_bytes) != expected:
            raise NotLiveError(f"rl_accel.kvcache: {name} has {found} bytes a token and head instead of {expected}")

    @property
    def _impls(self) -> list[Any]:
        return [layer.impl for layer in self._layers.values()]

    def _measure(self) -> list[tuple[Any, Rotation]]:
        """Return layers with what fits K and Q of the weights that are loaded."""
        if not self.settings.measures:
            return []
        started, found = time.perf_counter(), []
        for impl, pair in zip(self._impls, measuring.measured(self._runner, self._impls), strict=True):
            if pair is None or not all(torch.isfinite(x).all() for x in pair):
                continue  # a drafter's layer; weights that have not come yet
            settings = self.settings
            found.append((impl, choose_rotation(*pair, impl.bits, settings.order, settings.shift, settings.balance)))
        self._measured.append(1e3 * (time.perf_counter() - started))
        return found

    def on_weights(self, runner: Any, seconds: float) -> None:
        """Measure again; in force from the first step on whose requests all begin.

        Pages are read as they were written. New weights empty vLLM's prefix cache, but a request may run on over them.
        """
        if found := self._measure():
            self._rotations.offer(runner, found)

    def live(self) -> dict[str, Any]:
        """Return layers of each width, and the orders of their rotations."""
        return {
            "int4_layers": sum(impl.bits == 4 for impl in self._impls),
            "int8_layers": sum(impl.bits == 8 for impl in self._impls),
            "orders": [impl.rotation.order for impl in self._impls],
            "balanced_layers": sum(impl.rotation.exponents_KC is not None for impl in self._impls),
        }

    def drain(self) -> dict[str, float]:
        config = getattr(self._runner, "kv_cache_config", None)
        blocks = config.num_blocks if config is not None else 0
        measured, self._measured = self._measured, []
        impls = self._impls
        return {
            "tokens": float(blocks * self.vllm_config.cache_config.block_size),
            "bytes_per_token": float(sum(token_bytes(i.head_size, i.bits) * i.num_kv_heads for i in impls)),
            "order": sum(impl.rotation.order for impl in impls) / max(len(impls), 1),
            "balanced_layers": float(sum(impl.rotation.exponents_KC is not None for impl in impls)),
            "k_error": max((impl.rotation.k_error for impl in impls if impl.bits == 4), default=0.0),
            "measure_ms": sum(measured) / max(len(measured), 1),
        }
