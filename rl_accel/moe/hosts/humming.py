"""Our codes as weights of Humming, the JIT kernels that vLLM takes for GEMMs of few bits.

`unavailable` says why they cannot be used here, `to_humming` gives the tensors that `transform_humming_tensors` of the
package arranges for its kernels: codes one in an int32 (`pack_weight` of the package packs them, on a GPU), the scale
of each group, and a zero point in floating point, for w = (code - zero) scale. Ours is w = code scale + offset.

Zero points and scales have the dtype of the activations there. With bfloat16 that rounds each by up to 2^-9, and the
zero point weighs as much as the codes do: `conversion_error` measures it. Humming has no epilogue for the compensator,
which has to be added between its GEMM and the activation; vLLM's own method transforms weights once and never again,
so a refreshed policy needs `to_humming` and the transformation at every sync.

Left out: the call of its kernels in an engine. Nothing here has run them; they need a GPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
from dataclasses import dataclass
from typing import Any

import torch

from rl_accel.kernels.moe_int3 import reference
from rl_accel.kernels.moe_int3.layout import QuantizedMatrix

PACKAGE = "humming-kernels"
TESTED = ("0.1.19",)
"""Of these, shapes were compared with `HummingWeightSchema` and weights with `dequantize_weight` (equal), by hand with
CUDA left out; no kernel has run."""
QUANTIZE_KEYWORD = "has_global_scale"
"""What vLLM 0.28.0 passes to `quantize_weight`; 0.1.19 renamed it, so vLLM's own online quantization fails there."""
PREPARE_PARAMETERS = ("shape_n", "shape_k", "weight_schema", "num_experts", "torch_dtype")
"""Of `prepare_layer_config`, which this way of use needs."""


@dataclass(frozen=True)
class HummingTensors:
    weight: torch.Tensor
    """int32 [E, N, K], a code each."""
    weight_scale: torch.Tensor
    """float16 or bfloat16 [E, N, K / group_size]."""
    zero_point: torch.Tensor
    """float16 or bfloat16 [E, N, K / group_size]."""
    bits: int
    group_size: int


def unavailable() -> str | None:
    """Return why Humming cannot serve as base GEMM here, None if it can. Imports the package only if it is the one."""
    if importlib.util.find_spec("humming") is None:
        return f"{PACKAGE} is not installed: pip install {PACKAGE}=={TESTED[-1]}"
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return f"the module humming is not that of {PACKAGE}"
    if version not in TESTED:
        return (
            f"{PACKAGE} {version} is not one of those tested ({', '.join(TESTED)}): pip install {PACKAGE}=={TESTED[-1]}"
        )
    if not torch.cuda.is_available():
        return f"{PACKAGE} compiles its kernels for a GPU, and there is none"
    from humming.transform import prepare_layer_config, transform_humming_tensors

    return missing_parameters(prepare_layer_config, transform_humming_tensors)


def missing_parameters(prepare: Any, transform: Any) -> str | None:
    """Return what the package's functions lack of what is passed to them."""
    missing = [name for name in PREPARE_PARAMETERS if name not in inspect.signature(prepare).parameters]
    if missing:
        return f"prepare_layer_config of {PACKAGE} has no {', '.join(missing)}"
    if len(inspect.signature(transform).parameters) < 2:
        return f"transform_humming_tensors of {PACKAGE} takes no tensors"
    return None


def fits_vllm_online(quantize_weight: Any) -> bool:
    """Whether vLLM's own online quantization can call this `quantize_weight`."""
    return QUANTIZE_KEYWORD in inspect.signature(quantize_weight).parameters


def to_humming(matrix: QuantizedMatrix, dtype: torch.dtype) -> HummingTensors:
    """Return codes, scales and zero points for activations of `dtype`, float16 or bfloat16."""
    matrix.check_integrity()
    codes = reference.unpack(matrix.codes.cpu(), matrix.bits, matrix.in_features).int().to(matrix.codes.device)
    scale, offset = matrix.scales.float(), matrix.offsets.float()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # equal weights: codes of 0, the value is the offset
    # Divided by the scale that the kernel will see, so that its rounding does not move the offset.
    rounded = scale.to(dtype)
    return HummingTensors(codes, rounded, (-offset / rounded.float()).to(dtype), matrix.bits, matrix.group_size)


def dequantize(tensors: HummingTensors) -> torch.Tensor:
    """Return float32 [E, N, K], the weights as the package's own `dequantize_weight` defines them."""
    scale, zero = (
        x.float().repeat_interleave(tensors.group_size, -1) for x in (tensors.weight_scale, tensors.zero_point)
    )
    return (tensors.weight.float() - zero) * scale


def conversion_error(matrix: QuantizedMatrix, dtype: torch.dtype) -> float:
    """Return by how much the conversion changes the weights, in the Frobenius norm relative to theirs."""
    want = reference.dequantize(matrix)
    return float((dequantize(to_humming(matrix, dtype)) - want).norm() / want.norm())
