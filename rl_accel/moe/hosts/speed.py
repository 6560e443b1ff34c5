"""Whether packed experts of a CPU engine are faster than vLLM's kernel with the same layer: measured once, at the load.

Both get the same random tokens, each time with other experts, so that weights come from memory as in a decoding step
of many layers. Memory: one layer of plain weights while it is measured. Time: some hundred calls at most, for one layer
of each shape.

Host symbols: `_custom_ops.{cpu_prepack_moe_weight, cpu_fused_moe}`, as `cpu_moe.CPUUnquantizedExperts` calls them;
`UnquantizedFusedMoEMethod.experts_cls`, `cpu_moe.is_zentorch_moe_supported`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import torch

from rl_accel.moe.hosts.layers import TENSORS

logger = logging.getLogger(__name__)

BATCHES = (1, 8)
ROUNDS, MAX_SECONDS = 7, 1.0
"""Of a shape and batch."""


def measure(layers: Iterable[Any]) -> dict[str, float]:
    """Return stock's time over ours of a layer, the slowest shape's, as `b<tokens>`; says so where we are slower.

    Args:
        layers: layers of packed experts, after their weights came.
    """
    found: dict[str, float] = {}
    seen = set()
    for layer in layers:
        shape = tuple(part.shape for part in layer.parameters())
        if shape in seen:
            continue
        seen.add(shape)
        for name, ratio in _measure_layer(layer).items():
            found[name] = min(found.get(name, ratio), ratio)
    slow = {name: round(1 / ratio, 2) for name, ratio in found.items() if ratio < 1}
    if slow:
        logger.warning(
            "rl_accel: packed experts take longer here than vLLM's own (%s of its time); they save memory only; "
            "rl_accel.moe.mode=materialized has its speed",
            ", ".join(f"{factor} with {name[1:]} tokens" for name, factor in slow.items()),
        )
    return found


def _measure_layer(layer: Any) -> dict[str, float]:
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    if cpu_moe.is_zentorch_moe_supported(layer):
        return {}  # a kernel of AMD's plug-in, which this does not call
    dtype, isa = layer.moe_config.in_dtype, UnquantizedFusedMoEMethod(layer.moe_config).experts_cls.isa
    plain = [layer.rl_accel_used_weight(tensor).to(dtype) for tensor in TENSORS]
    num_experts, hidden_size = plain[1].shape[:2]
    w13, w2 = (ops.cpu_prepack_moe_weight(weight, isa) for weight in plain)
    chosen = min(layer.top_k, num_experts)

    def stock(x: torch.Tensor, scores: torch.Tensor, ids: torch.Tensor) -> object:
        return ops.cpu_fused_moe(x, w13, w2, None, None, scores, ids, "silu", isa, False)

    def ours(x: torch.Tensor, scores: torch.Tensor, ids: torch.Tensor) -> object:
        return layer.quant_method.compute(layer, x, scores, ids)

    generator = torch.Generator().manual_seed(0)
    found = {}
    for batch in BATCHES:
        x = torch.randn(batch, hidden_size, generator=generator).to(dtype)
        scores = torch.full((batch, chosen), 1 / chosen)
        inputs = [
            (x, scores, torch.rand(batch, num_experts, generator=generator).topk(chosen).indices.int())
            for _ in range(ROUNDS + 1)
        ]
        found[f"b{batch}"] = _ratio(stock, ours, inputs)
    return found


def _ratio(stock: Callable[..., object], ours: Callable[..., object], inputs: list[tuple]) -> float:
    """Return stock's time over ours: of medians; the first round warms up, and time is bounded."""
    seconds: dict[Any, list[float]] = {stock: [], ours: []}
    begun = time.perf_counter()
    for number, args in enumerate(inputs):
        for call, times in seconds.items():
            started = time.perf_counter()
            call(*args)
            if number:
                times.append(time.perf_counter() - started)
        if number and time.perf_counter() - begun > MAX_SECONDS:
            break
    return median(seconds[stock]) / median(seconds[ours])
