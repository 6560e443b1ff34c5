"""Layers whose weights are compressed when they arrive, and computed with as quantized values by vLLM's own kernels.

The values are what packed bytes stand for, rounded to the policy's dtype: numerics of a few bits at stock speed, no
memory saved. How packed bytes are computed with is `packed.py`.

Host symbols: `UnquantizedFusedMoEMethod`, `UnquantizedLinearMethod`, `process_weights_after_loading` of both, which
vLLM calls with plain weights at a first load and at every layer-wise reload.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from rl_accel.errors import MoEError
from rl_accel.kernels.moe_int3.layout import check_width
from rl_accel.moe.refresh import Refresher

TENSORS = ("w13", "w2")


def experts_method(refresher: Refresher, layer: Any, prefix: str) -> Any:
    """Return the method of a layer of experts for the mode that was asked for."""
    from rl_accel import machine

    mode = refresher.settings.mode
    if mode == "packed" or (mode == "auto" and machine.has_gpu()):
        from rl_accel.moe.hosts.packed import PackedExperts

        return PackedExperts(refresher, layer, prefix)
    return MaterializedExperts(refresher, layer, prefix)


class MaterializedExperts(UnquantizedFusedMoEMethod):
    """Stock experts of quantized values."""

    mode = "materialized"

    def __init__(self, refresher: Refresher, layer: Any, prefix: str):
        super().__init__(layer.moe_config)
        self.refresher, self.prefix = refresher, tensor_prefix(prefix)

    def create_weights(self, layer, num_experts, hidden_size, intermediate_size_per_partition, *args, **kwargs):
        check_widths(self.refresher, self.prefix, hidden_size, intermediate_size_per_partition)
        super().create_weights(layer, num_experts, hidden_size, intermediate_size_per_partition, *args, **kwargs)

    def process_weights_after_loading(self, layer: Any) -> None:
        keep_local_ranks(self.refresher, self.prefix, layer)
        for tensor in TENSORS:
            weight = getattr(layer, f"{tensor}_weight")
            found = self.refresher.refresh(f"{self.prefix}.{tensor}", weight.data)
            weight.data = found.weight().to(weight.dtype)
        if self.unquantized_backend.name == "CPU":
            self.moe_kernel = None  # made anew, for vLLM packs weights for this kernel only when it makes it
        super().process_weights_after_loading(layer)


class MiloLinear(UnquantizedLinearMethod):
    """A stock linear layer of quantized values."""

    mode = "materialized"

    def __init__(self, refresher: Refresher, prefix: str):
        super().__init__()
        self.refresher, self.prefix = refresher, prefix

    def create_weights(self, layer, input_size_per_partition, *args, **kwargs):
        try:
            check_width(self.refresher.settings.bits, self.refresher.settings.group_size, input_size_per_partition)
        except MoEError as error:
            raise MoEError(f"{self.prefix}: {error}; or set rl_accel.moe.linears=false") from None
        super().create_weights(layer, input_size_per_partition, *args, **kwargs)

    def process_weights_after_loading(self, layer: Any) -> None:
        weight = layer.weight
        found = self.refresher.refresh(self.prefix, weight.data)
        weight.data = found.weight()[0].to(weight.dtype)
        super().process_weights_after_loading(layer)


def tensor_prefix(name: str) -> str:
    """Return what names of a layer's tensors begin with in checkpoints and plans: vLLM adds a level of its own."""
    return name.removesuffix(".routed_experts")


def check_widths(refresher: Refresher, prefix: str, hidden_size: int, intermediate_size: int) -> None:
    """
    Raises:
        MoEError: if groups do not divide a row of this shard; it names the size that would.
    """
    settings = refresher.settings
    for what, width in (("hidden size", hidden_size), ("intermediate size of this shard", intermediate_size)):
        try:
            check_width(settings.bits, settings.group_size, width)
        except MoEError as error:
            raise MoEError(f"{prefix}: {what}: {error} (rl_accel.moe.group_size, tensor_parallel_size)") from None


def keep_local_ranks(refresher: Refresher, prefix: str, layer: Any) -> None:
    """A plan has the ranks of all experts; under expert parallelism a layer holds some."""
    expert_map: torch.Tensor | None = layer.expert_map
    if expert_map is not None:
        here = {expert: position for expert, position in enumerate(expert_map.tolist()) if position >= 0}
        for tensor in TENSORS:
            refresher.local(f"{prefix}.{tensor}", here)
