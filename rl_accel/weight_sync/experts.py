"""Read the routed experts of a vLLM layer back: what it holds, and whether its kernel multiplies with that.

The CPU's kernel keeps experts in a layout of its own. vLLM's own packing is asked what it makes of the weights that
were sent, which must be what the layer holds, to the bit; and the kernel, called on a few tokens, must give what a
plain loop over the sent weights gives. Left out: experts spread over ranks, quantized ones that do not offer
`rl_accel_used_weight`, and, of the kernel only, routing by groups or functions. Memory: one layer's experts twice.

Shapes: E experts, T tokens, K experts a token, H hidden size, I neurons of an expert.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

Expectation = Callable[[str, torch.Tensor], torch.Tensor]

NUM_TOKENS = 8
WEIGHT_TOLERANCE = 1e-5
"""Where weights differ by more, there is no need to ask the kernel."""
KERNEL_TOLERANCE = {torch.float32: 1e-4}
"""Largest difference of outputs, relative to the largest output; of rounding and of the order of sums."""
KERNEL_TOLERANCE_HALF = 0.03


def is_experts(module: torch.nn.Module) -> bool:
    """Whether a module is vLLM's `RoutedExperts`."""
    return hasattr(module, "ckpt_gate_proj_name") and hasattr(module, "moe_config")


def sent_experts(layer: Any, sent: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """Return `w13` [E, 2 I, H] (gate above up) and `w2` [E, H, I] as they were sent, or None if some were not kept.

    Args:
        sent: name -> tensor, experts one by one or fused, under the names that the layer loads.
    """
    # vLLM names the layer by the module around the experts and this one.
    prefix = layer.layer_name.removesuffix(".routed_experts")
    gate, up, down = layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name
    fused = [sent.get(f"{prefix}.{name}") for name in ("w13" if gate == "w1" else "gate_up_proj", down)]
    if fused[0] is not None and fused[1] is not None:
        if layer.is_fused_checkpoint_transposed:
            fused = [tensor.transpose(1, 2) for tensor in fused if tensor is not None]
        return {"w13": fused[0], "w2": fused[1]}  # type: ignore[dict-item]
    parts: dict[str, list[torch.Tensor]] = {}
    for name in (gate, up, down):
        found = [sent.get(f"{prefix}.{expert}.{name}.weight") for expert in range(layer.global_num_experts)]
        if any(tensor is None for tensor in found):
            return None
        parts[name] = found  # type: ignore[assignment]
    w13 = [torch.cat(pair) for pair in zip(parts[gate], parts[up], strict=True)]
    return {"w13": torch.stack(w13), "w2": torch.stack(parts[down])}


@torch.no_grad()
def experts_error(
    layer: Any, sent: Mapping[str, torch.Tensor], expectations: Sequence[Expectation] = ()
) -> tuple[float, str] | None:
    """Return the largest absolute difference of sent and used weights and which of them has it, `w13` or `w2`.

    Infinite, and `kernel`, where the weights are right and the kernel's output is not. None where nothing can be said.

    Args:
        layer: `RoutedExperts` of vLLM. A method `rl_accel_used_weight(which)` of it returns what it multiplies with,
            [E, out, in] float32, for layers that hold something else than plain weights.
        expectations: each is given `<layer's name>.w13` or `.w2` and the weight [E, out, in] that it should use so far.
    """
    wanted = sent_experts(layer, sent)
    config = layer.moe_config
    if wanted is None or config.tp_size != 1 or layer.local_num_experts != layer.global_num_experts:
        return None
    for which in wanted:
        for expectation in expectations:
            wanted[which] = expectation(f"{layer.layer_name}.{which}", wanted[which])
    if hasattr(layer, "rl_accel_used_weight"):
        pairs = {which: (layer.rl_accel_used_weight(which), wanted[which].float()) for which in wanted}
    elif hasattr(_kernel_experts(layer), "isa"):
        packed = _packed(layer, wanted)
        pairs = {which: (getattr(layer, f"{which}_weight"), packed[which]) for which in wanted}
    else:
        return None
    differences = {which: _difference(*pair) for which, pair in pairs.items()}
    which = max(differences, key=lambda name: differences[name])
    if differences[which] <= WEIGHT_TOLERANCE and not _kernel_agrees(layer, wanted):
        return float("inf"), "kernel"
    return differences[which], which


def _difference(used: torch.Tensor, wanted: torch.Tensor) -> float:
    """A NaN counts as infinite, and so does another shape."""
    if used.shape != wanted.shape:
        return float("inf")
    difference = float((used.float() - wanted.float()).abs().max())
    return difference if difference == difference else float("inf")


def _kernel_experts(layer: Any) -> Any:
    """The part of vLLM's method that packs and multiplies, or None."""
    return getattr(getattr(layer.quant_method, "moe_kernel", None), "fused_experts", None)


class _Unpacked(torch.nn.Module):
    """Stands for a layer whose weights are not packed yet; all but those are the layer's."""

    def __init__(self, layer: Any, weights: Mapping[str, torch.Tensor]):
        super().__init__()
        self.__dict__["_layer"] = layer
        for which, weight in weights.items():
            weight = weight.to(getattr(layer, f"{which}_weight").dtype).contiguous()
            self.register_parameter(f"{which}_weight", torch.nn.Parameter(weight, requires_grad=False))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.endswith("_weight"):  # never the packed one, also while one is replaced by another
                raise
            return getattr(self.__dict__["_layer"], name)


def _packed(layer: Any, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what vLLM's packing makes of weights; the layer and its kernel stay as they are."""
    stand_in = _Unpacked(layer, weights)
    copy.copy(_kernel_experts(layer)).process_weights_after_loading(stand_in)
    return {which: getattr(stand_in, f"{which}_weight") for which in weights}


def _kernel_agrees(layer: Any, weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether the layer gives what a plain loop over the weights gives, on a few tokens; True where it is not known."""
    plain = not layer.use_grouped_topk and layer.custom_routing_function is None and layer.scoring_func == "softmax"
    plain = plain and not layer.apply_router_weight_on_input and layer.routed_scaling_factor in (None, 1.0)
    plain = plain and not layer.moe_config.has_bias and layer.activation.value == "silu"
    if not (plain and layer.quant_method.is_monolithic):
        return True
    generator = torch.Generator().manual_seed(0)
    dtype = layer.moe_config.in_dtype
    x_TH = torch.randn(NUM_TOKENS, weights["w2"].shape[1], generator=generator).to(dtype)
    logits_TE = torch.randn(NUM_TOKENS, layer.global_num_experts, generator=generator).to(dtype)
    used_TH = layer.quant_method.apply_monolithic(layer, x_TH.clone(), logits_TE).float()
    top_TK, chosen_TK = logits_TE.float().topk(layer.top_k)
    norm_T1 = (top_TK if layer.renormalize else logits_TE.float()).logsumexp(-1, keepdim=True)
    wanted_TH = torch.zeros_like(used_TH)
    for token, (experts, shares) in enumerate(zip(chosen_TK.tolist(), (top_TK - norm_T1).exp(), strict=True)):
        for expert, share in zip(experts, shares, strict=True):
            gate_I, up_I = (weights["w13"][expert].float() @ x_TH[token].float()).chunk(2)
            wanted_TH[token] += share * (weights["w2"][expert].float() @ (F.silu(gate_I) * up_I))
    tolerance = KERNEL_TOLERANCE.get(dtype, KERNEL_TOLERANCE_HALF)
    return bool((used_TH - wanted_TH).abs().max() <= tolerance * wanted_TH.abs().max())
