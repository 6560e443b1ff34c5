"""Codes, scales and zero points for Humming: a round trip through the definition of its weights."""

from __future__ import annotations

import pytest
import torch

from rl_accel.kernels.moe_int3 import reference
from rl_accel.moe.hosts import humming


@pytest.mark.parametrize("bits, group_size", [(2, 32), (3, 64), (4, 32)])
def test_round_trip(bits: int, group_size: int) -> None:
    w = torch.randn(2, 24, 128, generator=torch.Generator().manual_seed(bits))
    w[0, 0] = 0.3  # equal weights: a scale of 0
    matrix = reference.quantize(w, bits, group_size, 3)
    tensors = humming.to_humming(matrix, torch.float16)
    assert tensors.weight.dtype == torch.int32 and tensors.weight.min() >= 0 and tensors.weight.max() < 1 << bits
    assert tensors.weight_scale.shape == tensors.zero_point.shape == (2, 24, 128 // group_size)
    assert torch.isfinite(tensors.zero_point).all()
    want = reference.dequantize(matrix)
    half, brain = (humming.conversion_error(matrix, dtype) for dtype in (torch.float16, torch.bfloat16))
    lost = float((want - w).norm() / w.norm())
    # Rounding of zero point and scale, beside what quantization itself loses.
    assert 5 * half < brain < 6e-3 < lost and half < 5e-4
    assert (humming.dequantize(tensors)[0, 0] - want[0, 0]).abs().max() < 2e-4


def test_says_why_it_cannot_be_used() -> None:
    reason = humming.unavailable()
    if torch.cuda.is_available():
        pytest.skip("depends on what is installed")
    assert "pip install humming-kernels==" in reason or "GPU" in reason


def test_signatures() -> None:
    def prepare(shape_n, shape_k, weight_schema, input_schema=None, num_experts=None, torch_dtype=None):
        raise NotImplementedError

    def renamed(shape_n, shape_k, schema, num_experts=None, torch_dtype=None):
        raise NotImplementedError

    def transform(config, tensors):
        raise NotImplementedError

    def quantize_weight(weight, dtype, scale_dtype, group_size, weight_scale_2_type=None):
        raise NotImplementedError

    assert humming.missing_parameters(prepare, transform) is None
    assert "weight_schema" in humming.missing_parameters(renamed, transform)
    assert "takes no tensors" in humming.missing_parameters(prepare, lambda config: config)
    assert not humming.fits_vllm_online(quantize_weight)
