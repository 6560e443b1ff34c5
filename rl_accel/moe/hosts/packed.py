"""Experts that stay packed: codes, scales and compensators as parameters, computed with by our kernels.

Parameters are named `<tensor>_<part>` for w13 and w2; which parts there are says `forms.py`. A layer-wise reload copies
new ones into the storage of the old, by name, so neither names nor shapes may change: bits and ranks are planned.

On a CPU a layer routes by itself, as vLLM's own experts there do. The calculation is a registered operation, which
compilers leave alone.

Host symbols: `OnlineMoEMethodBase` (quantization/online/moe_base.py), `cpu_moe.select_experts`, `RoutedExperts`.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.quantization.online.moe_base import OnlineMoEMethodBase

from rl_accel.errors import NotLiveError
from rl_accel.kernels.moe_int3 import api
from rl_accel.moe.compress import Compressed
from rl_accel.moe.hosts.forms import FORMS, CanonicalForm
from rl_accel.moe.hosts.layers import TENSORS, check_widths, keep_local_ranks, tensor_prefix
from rl_accel.moe.refresh import Refresher


class PackedExperts(OnlineMoEMethodBase):
    """Experts in packed bytes."""

    mode = "packed"

    def __init__(self, refresher: Refresher, layer: Any, prefix: str):
        """
        Raises:
            NotLiveError: for experts that the kernels do not compute: an activation other than SiLU, biases, routing
                weights on the input.
        """
        super().__init__(layer.moe_config)
        self.refresher, self.prefix = refresher, tensor_prefix(prefix)
        self.on_cpu = torch.get_default_device().type == "cpu"
        self.form = FORMS["canonical" if self.on_cpu else "planes"]
        unfit = {
            f"the activation {self.moe.activation}": self.moe.activation != MoEActivation.SILU,
            "biases": self.moe.has_bias,
            "router weights on the input": layer.apply_router_weight_on_input,
        }
        if any(unfit.values()):
            found = ", ".join(name for name, is_so in unfit.items() if is_so)
            raise NotLiveError(
                f"{prefix} has {found}, which packed experts do not cover; set rl_accel.moe.mode=materialized"
            )

    @property
    def is_monolithic(self) -> bool:
        return self.on_cpu

    def get_fused_moe_quant_config(self, layer: Any) -> FusedMoEQuantConfig:
        return FusedMoEQuantConfig.make()

    def create_weights(self, layer, num_experts, hidden_size, intermediate_size_per_partition, *args, **kwargs):
        check_widths(self.refresher, self.prefix, hidden_size, intermediate_size_per_partition)
        super().create_weights(layer, num_experts, hidden_size, intermediate_size_per_partition, *args, **kwargs)

    def process_weights_after_loading(self, layer: Any) -> None:
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return  # a first load comes here twice
        keep_local_ranks(self.refresher, self.prefix, layer)
        layer.rl_accel_widths = {}
        for tensor in TENSORS:
            found = self.refresher.refresh(f"{self.prefix}.{tensor}", getattr(layer, f"{tensor}_weight").data)
            delattr(layer, f"{tensor}_weight")
            parts, layer.rl_accel_widths[tensor] = self.form.tensors(found)
            for name, part in parts.items():
                layer.register_parameter(f"{tensor}_{name}", torch.nn.Parameter(part, requires_grad=False))
        if self.form is CanonicalForm:
            layer.rl_accel_used_weight = lambda tensor: used_weight(layer, tensor)
        layer._already_called_process_weights_after_loading = True

    def apply_monolithic(self, layer, x, router_logits, input_ids=None) -> torch.Tensor:
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import select_experts

        weights, ids = select_experts(
            x,
            router_logits,
            layer.top_k,
            layer.use_grouped_topk,
            layer.renormalize,
            layer.topk_group,
            layer.num_expert_group,
            layer.custom_routing_function,
            layer.scoring_func,
            layer.routed_scaling_factor,
            layer.e_score_correction_bias,
        )
        return self._compute(layer, x, weights, ids)

    def apply(self, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input) -> torch.Tensor:
        return self._compute(layer, x, topk_weights, topk_ids)

    def _compute(self, layer: Any, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.compute(layer, x, weights, ids if layer.expert_map is None else layer.expert_map[ids.long()])

    def compute(self, layer: Any, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """As `api.experts`, of the experts that are here, numbered from 0."""
        parts, widths = [], []
        for tensor in TENSORS:
            parts += _parts(layer, tensor, self.form)
            widths += layer.rl_accel_widths[tensor]
        return torch.ops.rl_accel.packed_experts(x, weights.float(), ids.int(), parts, widths, self.form.name)


def _parts(layer: Any, tensor: str, form: Any) -> list[torch.Tensor | None]:
    return [getattr(layer, f"{tensor}_{name}", None) for name in form.names]


@torch.library.custom_op("rl_accel::packed_experts", mutates_args=())
def packed_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    parts: list[torch.Tensor | None],
    widths: list[int],
    form: str,
) -> torch.Tensor:
    """`api.experts` of tensors and integers: those of w13, then those of w2."""
    half, width = len(parts) // 2, len(widths) // 2
    w13 = FORMS[form].arguments(parts[:half], widths[:width])
    w2 = FORMS[form].arguments(parts[half:], widths[width:])
    return api.experts(x, weights, ids, *w13, *w2)


@packed_experts.register_fake
def _(x, weights, ids, parts, widths, form):
    return torch.empty_like(x)


def used_weight(layer: Any, tensor: str) -> torch.Tensor:
    """Return what the packed bytes of a layer stand for, float32 [E, N, K]."""
    nothing = torch.empty(0)
    parts = [part.data if part is not None else None for part in _parts(layer, tensor, CanonicalForm)]
    return Compressed(*CanonicalForm.arguments(parts, layer.rl_accel_widths[tensor]), nothing, nothing).weight()
