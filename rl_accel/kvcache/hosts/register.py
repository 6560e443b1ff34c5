"""Makes the quantized KV cache known to vLLM.

On a GPU the backend is named in the configuration (`attention_backend=CUSTOM`), so every process must know the name
before. On a CPU vLLM has one backend and asks nobody: ours stands in its place while a model with the feature on is
being built, and for no other model.

Host symbols: `register_backend`, `AttentionBackendEnum` (v1/attention/backends/registry.py); `_cached_get_attn_backend`
(v1/attention/selector.py).
"""

from __future__ import annotations

from typing import Any

from rl_accel.errors import NotLiveError
from rl_accel.kvcache.config import KVCacheConfig

CPU_BACKEND = "rl_accel.kvcache.hosts.vllm_cpu.KVInt4Backend"
GPU_BACKEND = "rl_accel.kvcache.hosts.vllm_gpu.GpuKVInt4Backend"


def register() -> None:
    """Give vLLM the name of the GPU's backend when it knows backends; changes nothing for who does not ask for it."""
    import wrapt

    wrapt.register_post_import_hook(_name_custom, "vllm.v1.attention.backends.registry")


def _name_custom(registry: Any) -> None:
    custom = registry.AttentionBackendEnum.CUSTOM
    if not custom.is_overridden():  # by another package
        registry.register_backend(custom, GPU_BACKEND)


def settings_of(vllm_config: Any) -> KVCacheConfig:
    """Return the feature's settings of an engine."""
    from rl_accel.config import AccelConfig
    from rl_accel.hosts.vllm.plugin import settings

    return AccelConfig.from_mapping(settings(vllm_config)).settings["kvcache"]


class CpuOverride:
    """Ours in the place of vLLM's CPU backend, from `begin` to `end`."""

    def __init__(self) -> None:
        self._before: str | None = None

    def begin(self) -> None:
        """
        Raises:
            NotLiveError: if another package has replaced the backend.
        """
        from vllm.v1.attention.backends import registry

        backend = registry.AttentionBackendEnum.CPU_ATTN
        if backend.is_overridden() and backend.get_path() != CPU_BACKEND:
            raise NotLiveError(f"rl_accel.kvcache: another package has replaced CPU attention by {backend.get_path()}")
        registry.register_backend(backend, CPU_BACKEND)
        _forget_choices()

    def end(self) -> None:
        from vllm.v1.attention.backends import registry

        registry.AttentionBackendEnum.CPU_ATTN.clear_override()
        _forget_choices()


def _forget_choices() -> None:
    """vLLM remembers which backend it chose for a kind of layer."""
    from vllm.v1.attention import selector

    selector._cached_get_attn_backend.cache_clear()
