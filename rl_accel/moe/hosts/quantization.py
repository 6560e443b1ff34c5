"""vLLM's quantization method `milo`: which layer of a model is compressed, and how it computes.

vLLM makes one `MiloConfig` per engine, without arguments, and sends it to workers; settings are read there, from
`additional_config`, when the first layer asks.

Host symbols: `QuantizationConfig` (quantization/base_config.py), `RoutedExperts`, `LinearBase`,
`UnquantizedLinearMethod`, `get_current_vllm_config`.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from rl_accel.errors import NotLiveError
from rl_accel.moe.config import QUANTIZATION, MoEConfig
from rl_accel.moe.refresh import Refresher

NOT_QUANTIZED = (".gate", ".shared_expert_gate", "lm_head")
"""Ends of names of linear layers that decide instead of computing: routers and gates."""


class MiloConfig(QuantizationConfig):
    """Settings come from rl_accel's block; the object holds what the layers of one engine share."""

    def __init__(self) -> None:
        super().__init__()
        self.refresher: Refresher | None = None

    @classmethod
    def get_name(cls) -> Any:
        return QUANTIZATION

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MiloConfig:
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """
        Raises:
            NotLiveError: if the feature was not switched on with the method.
        """
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        from rl_accel.moe.hosts import layers

        if isinstance(layer, RoutedExperts):
            return layers.experts_method(self._shared(), layer, prefix)
        if not isinstance(layer, LinearBase):
            return None
        refresher = self._shared()
        if refresher.settings.linears and not prefix.endswith(NOT_QUANTIZED):
            return layers.MiloLinear(refresher, prefix)
        return UnquantizedLinearMethod()

    def _shared(self) -> Refresher:
        if self.refresher is None:
            from vllm.config import get_current_vllm_config

            self.refresher = Refresher(settings_of(get_current_vllm_config()))
        return self.refresher


def settings_of(vllm_config: Any) -> MoEConfig:
    """Return the feature's settings of an engine.

    Raises:
        NotLiveError: if it is not on.
    """
    from rl_accel.config import AccelConfig
    from rl_accel.hosts.vllm.plugin import settings

    accel = AccelConfig.from_mapping(settings(vllm_config))
    accel.check()
    found: MoEConfig = accel.settings["moe"]
    if not found.enabled:
        raise NotLiveError(
            "quantization=milo is lossy and needs its settings: additional_config={'rl_accel': {'allow_lossy': true, "
            "'moe': {'enable': true}}}"
        )
    return found


register_quantization_config(QUANTIZATION)(MiloConfig)
