"""Settings of the quantized KV cache, `rl_accel.kvcache.*`."""

from __future__ import annotations

from dataclasses import dataclass

from rl_accel.errors import ConfigError

AUTO, MAX_ORDER = 0, 256
MIN_VLLM = (0, 28)
"""Older ones have no hook for the bytes of a page."""
DTYPE = "int4_per_token_head"
"""vLLM's name of 4-bit K and V; what its pages hold is ours to say."""


@dataclass(frozen=True)
class KVCacheConfig:
    """K and V of rollouts in 4 bits (`rl_accel.kvcache.*`)."""

    enable: bool = False
    """Hold K and V in 4 bits with a scale and an offset per token and head; lossy."""
    order: int = AUTO
    """Values of K that are rotated together, a power of two up to the head size; 1: none. 0: for each layer the order
    with the smallest error of K, measured on the policy's weights whenever they change."""
    balance: bool = True
    """Divide dims of K that stand out, and multiply queries by as much: powers of two, measured as the order is."""
    rotate_v: bool = False
    """Rotate V, too."""
    int8_layers: int = 1
    """First layers that are held in 8 bits: most of the error comes from V of the first one."""
    shift: bool = False
    """Take the mean of K, measured as the order is, off every K; attention does not change by it."""

    def __post_init__(self) -> None:
        if not (self.order == AUTO or 1 <= self.order <= MAX_ORDER) or self.order & (self.order - 1):
            raise ConfigError(
                f"rl_accel.kvcache.order must be 0 (measured) or a power of two up to {MAX_ORDER}; got {self.order}"
            )
        if self.int8_layers < 0:
            raise ConfigError(f"rl_accel.kvcache.int8_layers must not be negative; got {self.int8_layers}")

    @property
    def enabled(self) -> bool:
        return self.enable

    @property
    def measures(self) -> bool:
        """Whether anything depends on the policy's weights."""
        return self.order == AUTO or self.shift or self.balance


def skip_layers(int8_layers: int) -> list[str]:
    """Return vLLM's `kv_cache_dtype_skip_layers`, which holds the layers of 8 bits."""
    return [str(layer) for layer in range(int8_layers)]
