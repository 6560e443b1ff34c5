"""Read the weights of a vLLM model back as its kernels use them, and compare them with what was sent.

A prepacked linear layer of the CPU build is read through the kernel itself: the layer applied to the identity matrix.
Fused projections (`qkv_proj`, `gate_up_proj`) are compared with the parts that they were made of. Routed experts:
`experts.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from rl_accel.weight_sync.experts import Expectation, experts_error, is_experts

BUDGET_BYTES = 256 << 20

PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_ROUTER_OR_EXPERTS = re.compile(r"(.+?)\.(?:gate|router|experts)\.")


class SentSample:
    """Copies of sent tensors up to `BUDGET_BYTES`, embedding and LM head first in line as they are sent first.

    Router and experts of the first layer that has any are kept whatever they weigh, and not counted: a layer of which
    one expert is missing could not be compared at all.
    """

    def __init__(self, budget_bytes: int = BUDGET_BYTES):
        self.tensors: dict[str, torch.Tensor] = {}
        self._left = budget_bytes
        self._first_moe = ""

    def add(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        """Keep what fits. The tensors must not be views of a buffer that is reused."""
        for name, tensor in weights:
            if found := _ROUTER_OR_EXPERTS.match(name):
                self._first_moe = self._first_moe or found[1]
                if found[1] == self._first_moe:
                    self.tensors[name] = tensor
                    continue
            if tensor.nbytes <= self._left:
                self.tensors[name] = tensor
                self._left -= tensor.nbytes


@torch.no_grad()
def used_weight(module: torch.nn.Module) -> torch.Tensor | None:
    """Return the weight of a linear layer as its kernel multiplies with it, [out, in] float32, or None."""
    kernel = getattr(module, "cpu_linear", None)
    if kernel is None:
        return None
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    # A packed weight does not tell its shape; a replicated layer, such as a router, has `input_size` only.
    widths = (getattr(module, name, None) for name in ("input_size_per_partition", "input_size", "embedding_dim"))
    in_features = next((int(width) for width in widths if width), None) or weight.shape[1]
    return kernel(torch.eye(in_features, dtype=_dtype(module)), weight, None).T.float()


def readback_error(
    model: torch.nn.Module,
    sent: SentSample,
    expectations: Sequence[Expectation] = (),
) -> tuple[float, str]:
    """Return the largest absolute difference and the name of the module where it is.

    Args:
        expectations: each is given a module's name and the weight that it should use so far, [out, in], and returns
            the weight that it should use after all; what a feature does to weights on purpose. Of routed experts the
            name ends with `.w13` or `.w2`, and the weight is [E, out, in].

    Modules whose parts were not kept are left out; a NaN counts as infinite. At least one module must be comparable.
    """
    worst, where = -1.0, ""
    for name, module in model.named_modules():
        if is_experts(module):
            found = experts_error(module, sent.tensors, expectations)
            if found is not None and found[0] > worst:
                worst, where = found[0], f"{name}.{found[1]}"
            continue
        expected = _expected(name, sent.tensors)
        used = used_weight(module) if expected is not None else None
        if expected is None or used is None:
            continue
        for expectation in expectations:
            expected = expectation(name, expected)
        expected = expected.to(_dtype(module))  # an engine in bfloat16 rounds what it is sent
        difference = float((used[: expected.shape[0]] - expected.float()).abs().max())
        if difference != difference:
            difference = float("inf")
        if difference > worst:
            worst, where = difference, name
    return (worst, where) if where else (float("inf"), "<nothing could be compared>")


def _dtype(module: torch.nn.Module) -> torch.dtype:
    """The dtype that a linear layer computes in; its weight may be gone, once it is packed."""
    return getattr(module, "params_dtype", None) or module.weight.dtype  # type: ignore[return-value]


def _expected(name: str, sent: dict[str, torch.Tensor]) -> torch.Tensor | None:
    prefix, _, last = name.rpartition(".")
    if last in PARTS:
        parts = [sent.get(f"{prefix}.{part}.weight") for part in PARTS[last]]
        return None if any(part is None for part in parts) else torch.cat(parts)  # type: ignore[arg-type]
    if last == "lm_head" and "lm_head.weight" not in sent:
        return sent.get("model.embed_tokens.weight")
    return sent.get(f"{name}.weight")
