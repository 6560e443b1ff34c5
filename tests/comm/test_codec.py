"""The codec: what its specification promises, and backends that equal it bit for bit."""

from __future__ import annotations

import math

import pytest
import torch

from rl_accel.errors import CommError
from rl_accel.kernels.codec import layout, reference
from rl_accel.kernels.codec.api import dequantize, dequantize_add, quantize, requantize
from rl_accel.kernels.codec.layout import max_code, packed_bytes, padded
from rl_accel.kernels.common.hadamard import hadamard as transform
from rl_accel.kernels.common.noise import fold_key, rounding_noise

FORMATS = [(4, 32), (4, 128), (4, 2048), (8, 32), (8, 512)]
SIZES = [0, 1, 31, 33, 128, 1000, 5000]


def values(numel: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    """Normal values whose groups differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator)
    return x * torch.exp(spread * torch.randn(-(-numel // 32), generator=generator)).repeat_interleave(32)[:numel]


def scales_of(block: torch.Tensor, numel: int, bits: int, group_size: int) -> torch.Tensor:
    return block[padded(numel, group_size) * bits // 8 :].view(torch.float32)


def per_value(scales: torch.Tensor, numel: int, group_size: int) -> torch.Tensor:
    return scales.repeat_interleave(group_size)[:numel]


@pytest.mark.parametrize("bits,group_size", FORMATS)
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("hadamard", [False, True])
def test_nearest_is_off_by_half_a_scale_at_most(bits, group_size, numel, hadamard):
    x = values(numel)
    block = quantize(x, bits, group_size, hadamard=hadamard, backend="torch")
    assert block.numel() == packed_bytes(numel, bits, group_size)
    back = dequantize(block, numel, bits, group_size, hadamard=hadamard, backend="torch")
    scales = per_value(scales_of(block, numel, bits, group_size), numel, group_size)
    # Rotated: 32 errors of half a scale, divided by 32.
    assert torch.all((back - x).abs() <= 0.501 * scales + 1e-6 * x.abs())


def test_the_largest_value_of_a_group_is_kept():
    x = values(1024)
    back = dequantize(quantize(x, backend="torch"), 1024, backend="torch")
    for group, held in zip(x.view(-1, 128), back.view(-1, 128), strict=True):
        largest = group.abs().argmax()
        assert held[largest] == pytest.approx(group[largest].item(), rel=1e-6)


@pytest.mark.parametrize("byte", range(256))
def test_every_byte_of_two_codes_unpacks_to_what_packs_to_it(byte):
    low, high = (byte & 15) - 16 * (byte & 8 > 0), (byte >> 4) - 16 * (byte >> 7)
    codes = reference._unpack(torch.full((16,), byte, dtype=torch.uint8), 4)
    assert codes.tolist() == [low] * 16 + [high] * 16
    assert reference._pack(codes.to(torch.int8).view(1, -1), 4).tolist() == [byte] * 16


def test_stochastic_rounding_is_unbiased():
    x = values(512, spread=0.5)
    draws = 2000
    total = torch.zeros(512, dtype=torch.float64)
    for step in range(draws):
        block = quantize(x, 4, 128, "stochastic", seed=7, step=step, backend="torch")
        total += dequantize(block, 512, backend="torch")
    scales = per_value(scales_of(block, 512, 4, 128), 512, 128)
    bias = (total / draws - x).abs() / scales
    # A draw's deviation is at most half a scale; 512 means of 2,000 draws pass 5.5 sigma once in 50,000 runs.
    assert bias.max() < 5.5 * 0.5 / math.sqrt(draws)


def test_noise_is_uniform_and_independent_of_neighbors_steps_and_seeds():
    count = 1 << 18
    first = rounding_noise(fold_key(1, 0), 0, count).double()
    assert first.min() >= -0.5
    assert first.max() < 0.5
    shares = torch.histc(first, bins=64, min=-0.5, max=0.5)
    chi2 = ((shares - count / 64) ** 2 / (count / 64)).sum()
    assert chi2 < 63 + 5 * math.sqrt(2 * 63)
    others = [first.roll(1), first.roll(2), first.roll(32)]
    others += [rounding_noise(key, 0, count).double() for key in (fold_key(1, 1), fold_key(2, 0), 1, 2)]
    others += [rounding_noise(fold_key(1, 0), 1 << shift, count).double() for shift in (32, 33, 40)]
    for other in others:
        assert abs(12 * (first * other).mean()) < 5 / math.sqrt(count)


def test_noise_depends_on_the_global_index_alone():
    whole = quantize(values(4096), 4, 128, "stochastic", seed=3, backend="torch")
    halves = [
        quantize(part.contiguous(), 4, 128, "stochastic", seed=3, offset=2048 * i, backend="torch")
        for i, part in enumerate(values(4096).chunk(2))
    ]
    assert torch.equal(whole[:2048], torch.cat([half[:1024] for half in halves]))
    assert not torch.equal(halves[1], quantize(values(4096)[2048:], 4, 128, "stochastic", seed=3, backend="torch"))


def test_hadamard_is_its_own_inverse_and_orthogonal():
    x = values(320)
    assert torch.allclose(transform(transform(x, 32), 32) / 32, x, rtol=1e-5, atol=1e-5)
    matrix = torch.stack([transform(row, 32) for row in torch.eye(32)])
    assert torch.equal(matrix @ matrix.T, 32 * torch.eye(32))
    assert torch.equal(matrix.abs(), torch.ones(32, 32))


def test_hadamard_spreads_outliers():
    """1 % of values 30 times as large, 4 bits in groups of 512: the rotation takes most of the error away."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1 << 16, generator=generator)
    x[torch.rand(x.shape, generator=generator) < 0.01] *= 30
    errors = {}
    for hadamard in (False, True):
        block = quantize(x, 4, 512, hadamard=hadamard, backend="torch")
        back = dequantize(block, x.numel(), 4, 512, hadamard=hadamard, backend="torch")
        errors[hadamard] = (back - x).norm().item()
    assert errors[True] < 0.6 * errors[False]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("hadamard", [False, True])
def test_a_value_that_is_not_finite_survives_and_spoils_its_group_only(bad, hadamard):
    x = values(1024)
    x[300] = bad
    for bits in (4, 8):
        back = dequantize(
            quantize(x, bits, hadamard=hadamard, backend="torch"), 1024, bits, hadamard=hadamard, backend="torch"
        )
        assert torch.isnan(back[256:384]).all()
        assert torch.isfinite(back[:256]).all()
        assert torch.isfinite(back[384:]).all()


def test_not_finite_values_survive_both_hops():
    x = values(1024)
    x[300] = math.inf
    blocks = torch.stack([quantize(values(1024, 1), 8, 512, backend="torch"), quantize(x, 8, 512, backend="torch")])
    back = dequantize(requantize(blocks, 1024, 8, 512, backend="torch"), 1024, backend="torch")
    assert torch.isnan(back[:512]).all()
    assert torch.isfinite(back[512:]).all()


def test_groups_of_nothing_or_next_to_nothing_are_zero():
    x = torch.zeros(256)
    x[128:] = 1e-42
    block = quantize(x, backend="torch")
    assert not block.any()
    assert not dequantize(block, 256, backend="torch").any()


def test_weight_differences_catch_up():
    """Error feedback without a buffer: what was lost is part of the next difference, so held weights follow."""
    generator = torch.Generator().manual_seed(0)
    master = torch.randn(4096, generator=generator)
    held, drifting = master.clone(), master.clone()
    for _ in range(200):
        before = master.clone()
        master = master + 1e-3 * torch.randn(4096, generator=generator)
        dequantize_add(quantize(master, subtract=held, backend="torch"), held, backend="torch")
        dequantize_add(quantize(master, subtract=before, backend="torch"), drifting, backend="torch")  # no feedback
    assert (held - master).norm() < 0.2 * (before - master).norm()
    assert (drifting - master).norm() > 4 * (held - master).norm()


def test_sum_of_two_hops_is_within_the_bound_of_their_scales():
    parts = [values(2048, seed) for seed in range(4)]
    blocks = torch.stack([quantize(part, 8, 512, hadamard=True, backend="torch") for part in parts])
    middle = requantize(blocks, 2048, 8, 512, backend="torch")
    back = dequantize(middle, 2048, hadamard=True, backend="torch")
    exact = sum(part.double() for part in parts)
    bound = sum(per_value(scales_of(block, 2048, 8, 512), 2048, 512) for block in blocks)
    bound = 0.51 * (bound + per_value(scales_of(middle, 2048, 4, 128), 2048, 128))
    assert torch.all((back - exact).abs() <= bound)


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda: quantize(torch.zeros(8, dtype=torch.float64)), "float32 or bfloat16"),
        (lambda: quantize(torch.zeros(8), bits=5), "4 or 8 bits"),
        (lambda: quantize(torch.zeros(8), group_size=96), "power of two"),
        (lambda: quantize(torch.zeros(8), rounding="up"), "nearest, stochastic"),
        (lambda: quantize(torch.zeros(8), offset=5), "multiple of group_size"),
        (lambda: quantize(torch.zeros(8, 8).T), "contiguous"),
        (lambda: quantize(torch.zeros(8), subtract=torch.zeros(9)), "must have 8 values"),
        (lambda: quantize(torch.zeros(8), out=torch.zeros(3, dtype=torch.uint8)), "68 bytes"),
        (lambda: quantize(torch.zeros(8), out=torch.zeros(70, dtype=torch.uint8)[1:69]), "multiple of 4 bytes"),
        (lambda: dequantize(torch.zeros(8, dtype=torch.uint8), 8), "68"),
        (lambda: dequantize(torch.zeros(68, dtype=torch.uint8), 8, add=True), "needs `out`"),
        (lambda: quantize(torch.zeros(8), backend="fpga"), "unknown"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(call, words):
    with pytest.raises(CommError, match=words):
        call()


def test_sizes():
    assert packed_bytes(0, 4, 128) == 0
    assert packed_bytes(1, 4, 128) == 68
    assert packed_bytes(2048, 4, 2048) * 8 / 2048 == pytest.approx(4.0156, abs=1e-4)
    assert packed_bytes(4096, 8, 512) * 8 / 4096 == pytest.approx(8.0625)
    assert max_code(4) == 7
    with pytest.raises(CommError):
        layout.check_format(4, 16)
