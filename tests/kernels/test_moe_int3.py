"""Quantized experts in PyTorch: packing, the quantizer against its definition, layers against float64."""

from __future__ import annotations

import random
from dataclasses import replace
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from rl_accel.errors import MoEError
from rl_accel.kernels.moe_int3 import api, reference
from rl_accel.kernels.moe_int3.layout import BITS, BLOCK, LANES, Factors, QuantizedMatrix


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def matrix(bits: int = 3, group_size: int = 32, shape: tuple[int, int, int] = (2, 5, 96)) -> QuantizedMatrix:
    return reference.quantize(torch.randn(shape), bits, group_size, 4)


def factors(of: QuantizedMatrix, ranks: list[int]) -> Factors:
    v = reference.quantize_factor(torch.randn(sum(ranks), of.in_features) * 0.1, 4)
    u = reference.quantize_factor(torch.randn(sum(ranks), of.out_features), 4)
    return Factors(*v, *u, torch.tensor([0, *ranks]).cumsum(0).int())


@hypothesis.given(st.sampled_from(BITS), st.integers(1, 200), st.integers(0, 2**32))
@hypothesis.settings(deadline=None, max_examples=30)
def test_packing_round_trips(bits: int, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (3, length), generator=generator, dtype=torch.uint8)
    packed = reference.pack(codes, bits)
    assert packed.shape == (3, -(-length // BLOCK) * LANES * bits)  # without waste in whole blocks
    assert torch.equal(reference.unpack(packed, bits, length), codes)


@pytest.mark.parametrize("bits", BITS)
def test_a_code_lies_where_the_layout_says(bits: int) -> None:
    for k in (0, 7, 8, 37, 63, 64, 100):
        codes = torch.zeros(128, dtype=torch.uint8)
        codes[k] = (1 << bits) - 1
        found = int.from_bytes(bytes(reference.pack(codes, bits).tolist()), "little")
        first = (k // BLOCK) * BLOCK * bits + (k % LANES) * LANES * bits + bits * (k % BLOCK // LANES)
        assert found == ((1 << bits) - 1) << first


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 64])
def test_least_squares_beats_ranges_which_beat_rounding(bits: int, group_size: int) -> None:
    w = torch.randn(1, 64, 192, generator=torch.Generator().manual_seed(bits))
    groups = w.unflatten(-1, (-1, group_size))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / ((1 << bits) - 1)
    rounded = (torch.round((groups - low) / step) * step + low).flatten(-2)
    ranges, fitted = (reference.dequantize(reference.quantize(w, bits, group_size, n)) for n in (0, 10))
    errors = [float((w - x).norm() / w.norm()) for x in (rounded, ranges, fitted)]
    assert errors[0] > errors[1] > errors[2], errors


def test_fitted_scale_and_offset_are_those_of_least_squares() -> None:
    """For the codes that were found no scale and offset is better, but for the rounding to float16."""
    w = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(3))
    found = reference.quantize(w, 3, 64, 50)
    codes = reference.unpack(found.codes, 3, 64)[0, 0].double()
    solution = torch.linalg.lstsq(torch.stack([codes, torch.ones(64).double()], 1), w[0, 0].double()[:, None]).solution
    best = (w[0, 0] - codes * solution[0] - solution[1]).norm()
    assert best <= (w - reference.dequantize(found)).norm() <= 1.002 * best


@pytest.mark.parametrize("value", [0.0, -0.0, 3.5, -1e-3, 1e-9])
def test_a_group_of_equal_weights(value: float) -> None:
    found = reference.quantize(torch.full((1, 1, 64), value), 3, 32, 5)
    expected = torch.tensor(value).half() + 0.0
    assert not found.codes.any() and not found.scales.any() and (found.offsets == expected).all()
    assert not (found.offsets.view(torch.int16) == -0x8000).any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_a_group_that_cannot_be_served_is_nan_and_no_other(value: float) -> None:
    w = torch.randn(1, 2, 64)
    w[0, 0, 40] = value
    nan = reference.dequantize(reference.quantize(w, 3, 32, 5)).isnan()
    assert nan[0, 0, 32:].all() and nan.sum() == 32
    codes, scales = reference.quantize_factor(w[0], 5)
    assert reference.dequantize_factor(codes, scales, 64).isnan().all(-1).tolist() == [True, False]


def test_factors_lose_less_than_a_step() -> None:
    x = torch.randn(6, 100, generator=torch.Generator().manual_seed(1))
    read = reference.dequantize_factor(*reference.quantize_factor(x, 8), 100)
    assert ((x - read).norm() / x.norm()) < 0.12  # 400 seeds: .094 on average, .113 at most
    assert read.shape == x.shape and reference.quantize_factor(x, 8)[0].shape == (6, 2 * 32)


def test_fused_multiply_add_rounds_once() -> None:
    """Against fractions, on operands whose product and sum nearly cancel or nearly tie, and on subnormal results."""
    rng = random.Random(0)
    rows = []
    for _ in range(3000):
        a, b = (rng.uniform(-2, 2) * 2.0 ** rng.randint(-40, 3) for _ in range(2))
        c = -a * b * (1 + rng.choice([0, 1, -1]) * 2.0 ** -rng.randint(20, 50)) * 2.0 ** rng.choice([0, 0, 24, 25, 53])
        rows.append((a, b, c))
    a, b, c = torch.tensor(rows).T.contiguous()
    found = reference.fma(a, b, c)
    for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), found.tolist(), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        near = torch.tensor(result)
        below, above = (torch.nextafter(near, torch.tensor(limit)).item() for limit in (-torch.inf, torch.inf))
        distance = abs(exact - Fraction(result))
        assert distance <= min(abs(exact - Fraction(below)), abs(exact - Fraction(above)))


@pytest.mark.parametrize("bits", BITS)
def test_layers_are_those_of_the_dequantized_weights(bits: int) -> None:
    torch.manual_seed(bits)
    w13, w2 = matrix(bits, 32, (2, 64, 96)), matrix(bits, 32, (2, 96, 32))
    f13, f2 = factors(w13, [3, 0]), factors(w2, [2, 5])
    dense = []
    for of, low_rank in ((w13, f13), (w2, f2)):
        starts = low_rank.starts.tolist()
        v = reference.dequantize_factor(low_rank.v_codes, low_rank.v_scales, of.in_features).double()
        u = reference.dequantize_factor(low_rank.u_codes, low_rank.u_scales, of.out_features).double()
        base = reference.dequantize(of).double()
        dense.append([base[e] + u[starts[e] : starts[e + 1]].T @ v[starts[e] : starts[e + 1]] for e in range(2)])
    x, weights = torch.randn(3, 96), torch.rand(3, 2)
    ids = torch.tensor([[0, 1], [1, -1], [-1, -1]]).int()
    found = reference.experts(x, weights, ids, w13, f13, w2, f2)
    expected = torch.zeros(3, 96).double()
    for token in range(3):
        for slot, expert in enumerate(ids[token].tolist()):
            if expert >= 0:
                gate, up = (dense[0][expert] @ x[token].double()).chunk(2)
                inner = torch.nn.functional.silu(gate) * up
                expected[token] += weights[token, slot].double() * (dense[1][expert] @ inner)
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-4)
    assert not found[2].any()


def test_damaged_matrices_and_factors_are_refused() -> None:
    of = matrix()
    low_rank = factors(of, [1, 2])
    of.check_integrity()
    low_rank.check_integrity(of)
    for field, damaged in (
        ("codes", of.codes[..., :-1]), ("scales", of.scales.float()), ("offsets", of.offsets[:1]), ("bits", 5),
        ("group_size", 16), ("in_features", 128),
    ):  # fmt: skip
        with pytest.raises(MoEError):
            replace(of, **{field: damaged}).check_integrity()
    for field, damaged in (
        ("v_codes", low_rank.v_codes[:2]), ("u_scales", low_rank.u_scales.float()),
        ("starts", torch.tensor([0, 2, 1]).int()), ("starts", torch.tensor([1, 1, 3]).int()),
    ):  # fmt: skip
        with pytest.raises(MoEError):
            replace(low_rank, **{field: damaged}).check_integrity(of)


def test_what_cannot_be_quantized_is_refused() -> None:
    with pytest.raises(MoEError, match="a group size of 32 would"):
        api.quantize(torch.zeros(1, 1, 96), 3, 64, 1)
    with pytest.raises(MoEError, match="contiguous float32"):
        api.quantize(torch.zeros(1, 1, 64).half(), 3, 64, 1)
    with pytest.raises(MoEError, match="backend 'cuda9'"):
        api.load_backend("cuda9")


def test_bytes_are_those_of_the_layout() -> None:
    """3 bits and float16 scale and offset for every 64: 3.5 bits a weight."""
    of = matrix(3, 64, (1, 8, 256))
    assert of.memory_bytes() * 8 == 3.5 * 8 * 256
