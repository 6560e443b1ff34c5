"""Quantized experts in C++ against the specification, bit for bit: every instruction set that this CPU has, one
thread and several."""

from __future__ import annotations

import math
import random
import threading

import pytest
import torch

from rl_accel.errors import MoEError
from rl_accel.kernels.moe_int3 import api, cpp, reference
from rl_accel.kernels.moe_int3.layout import Factors, QuantizedMatrix

INSTRUCTIONS = ("scalar", "avx2", "avx512")


def supported() -> list[str]:
    found = []
    for name in INSTRUCTIONS:
        try:
            cpp.set_instructions(name)
        except ValueError:
            continue
        found.append(name)
    cpp.set_instructions("auto")
    return found


@pytest.fixture(autouse=True)
def defaults():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    cpp.set_instructions("auto")


def assert_same(found: torch.Tensor, expected: torch.Tensor, what: object) -> None:
    """The same bits, of NaN only that it is one."""
    assert found.dtype == expected.dtype and found.shape == expected.shape, what
    if found.is_floating_point():
        both_nan = found.isnan() & expected.isnan()
        bits = torch.int32 if found.dtype == torch.float32 else torch.int16
        found, expected = (x.masked_fill(both_nan, 0.0).view(bits) for x in (found, expected))
    assert torch.equal(found, expected), f"{what}: {int((found != expected).sum())} of {found.numel()} differ"


def run(call, expected: tuple[torch.Tensor, ...], threads: tuple[int, ...] = (1, 2)) -> None:
    """Compare what `call()` returns in every instruction set."""
    for name in supported():
        cpp.set_instructions(name)
        for num_threads in threads:
            torch.set_num_threads(num_threads)
            found = call()
            torch.set_num_threads(1)
            for i, (x, y) in enumerate(zip(found, expected, strict=True)):
                assert_same(x, y, (name, num_threads, i))


def tensors(of: QuantizedMatrix) -> tuple[torch.Tensor, ...]:
    return of.codes, of.scales, of.offsets


def odd_weights(rows: int, length: int, seed: int) -> torch.Tensor:
    """Rows of several magnitudes; some with zeros of both signs, constants, values beyond float16 or not finite."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    w = torch.randn(rows, length, generator=generator) * 10.0 ** torch.randint(-6, 3, (rows, 1), generator=generator)
    for row in w:
        k = rng.randrange(length)
        match rng.randrange(12):
            case 0:
                row.fill_(rng.choice([0.0, -0.0, 1.5, 1e-8, 7e4]))
            case 1:
                row[:k], row[k:] = 0.0, -0.0
            case 2:
                row[k] = rng.choice([math.nan, math.inf, -math.inf, 1e5, -3e38])
            case 3:
                row *= rng.choice([1e-41, 1e-38, 1e36])
            case 4:
                row.round_()
    return w


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("group_size", "length"), [(32, 32), (32, 96), (64, 64), (64, 192)])
def test_quantizer(bits: int, group_size: int, length: int) -> None:
    for iterations in (0, 1, 10):
        w = odd_weights(60, length, 1000 * bits + length + iterations).view(3, 20, length)
        expected = reference.quantize(w, bits, group_size, iterations)
        run(lambda w=w, n=iterations: tensors(cpp.quantize(w, bits, group_size, n)), tensors(expected))
        run(lambda of=expected: (cpp.dequantize(of),), (reference.dequantize(expected),))


@pytest.mark.parametrize("length", [1, 32, 64, 100, 160])
def test_quantizer_of_factors(length: int) -> None:
    for iterations in (0, 1, 8):
        x = odd_weights(40, length, length + iterations)
        expected = reference.quantize_factor(x, iterations)
        run(lambda x=x, n=iterations: cpp.quantize_factor(x, n), expected)
        run(lambda q=expected: (cpp.dequantize_factor(*q, length),), (reference.dequantize_factor(*expected, length),))


def test_iterations_that_are_left_out_change_nothing() -> None:
    w = torch.randn(1, 40, 128)
    run(lambda: tensors(cpp.quantize(w, 3, 64, 60)), tensors(reference.quantize(w, 3, 64, 60)))


def test_many_rows_are_cut_for_threads() -> None:
    """More weights than an item has, in rows that are no multiple of a vector's groups."""
    w = torch.randn(3, 71, 192)
    run(lambda: tensors(cpp.quantize(w, 3, 64, 3)), tensors(reference.quantize(w, 3, 64, 3)), (1, 2, 5))


def make_factors(of: QuantizedMatrix, ranks: list[int]) -> Factors:
    v = reference.quantize_factor(torch.randn(sum(ranks), of.in_features) * 0.1, 3)
    u = reference.quantize_factor(torch.randn(sum(ranks), of.out_features), 3)
    return Factors(*v, *u, torch.tensor([0, *ranks]).cumsum(0).int())


@pytest.mark.parametrize("seed", range(30))
def test_linear(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    num_matrices, group_size = rng.choice([1, 2, 3]), rng.choice([32, 64])
    shape = (num_matrices, rng.choice([1, 5, 8, 63, 65, 130, 200]), group_size * rng.choice([1, 2, 3, 5, 9]))
    of = reference.quantize(torch.randn(shape), rng.choice([2, 3, 4]), group_size, 1)
    ranks = [rng.choice([0, 1, 3, 8, 9, 17]) for _ in range(num_matrices)]
    low_rank = make_factors(of, ranks) if rng.random() < 0.7 else None
    x = torch.randn(rng.choice([0, 1, 2, 3, 4, 5, 7, 11]), of.in_features)
    if rng.random() < 0.2:
        of.scales[0, 0, 0] = math.nan
    expert = rng.randrange(num_matrices)
    expected = reference.linear(x, of, low_rank, expert)
    run(lambda: (cpp.linear(x, of, low_rank, expert),), (expected,))


@pytest.mark.parametrize("seed", range(24))
def test_experts(seed: int) -> None:
    """Ranks of 0 and ragged ones, experts without tokens, tokens without experts, one of a token twice."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    num_experts, bits, group_size = rng.choice([1, 2, 4]), rng.choice([2, 3, 4]), rng.choice([32, 64])
    hidden, inner = (group_size * rng.choice([1, 2, 3] if group_size == 32 else [1, 2]) for _ in range(2))
    w13 = reference.quantize(torch.randn(num_experts, 2 * inner, hidden) * 0.2, bits, group_size, 1)
    w2 = reference.quantize(torch.randn(num_experts, hidden, inner) * 0.2, bits, group_size, 1)
    f13, f2 = (
        make_factors(of, [rng.choice([0, 1, 5, 9]) for _ in range(num_experts)]) if rng.random() < 0.7 else None
        for of in (w13, w2)
    )
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
    x = torch.randn(rng.choice([1, 2, 3, 9]), hidden).to(dtype)
    weights = torch.rand(len(x), rng.choice([1, 2, 3]))
    ids = torch.randint(-1, num_experts, weights.shape).int()
    if rng.random() < 0.2:
        x[0, 3] = rng.choice([math.nan, math.inf, 300.0])
    expected = reference.experts(x, weights, ids, w13, f13, w2, f2)
    run(lambda: (cpp.experts(x, weights, ids, w13, f13, w2, f2),), (expected,))
    assert not (ids < 0).all(-1).any() or not expected[(ids < 0).all(-1)].any()


def wide_layer() -> tuple[QuantizedMatrix, Factors, QuantizedMatrix, Factors]:
    torch.manual_seed(0)
    w13 = cpp.quantize(torch.randn(8, 384, 512) * 0.05, 3, 64, 2)
    w2 = cpp.quantize(torch.randn(8, 512, 192) * 0.05, 3, 64, 2)
    return w13, make_factors(w13, [0, 4, 16, 1, 2, 3, 8, 5]), w2, make_factors(w2, [3] * 8)


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_a_token_depends_on_itself_alone(name: str) -> None:
    """Alone, in a batch, among others in another order, with one thread and several: the same bits; memory is poisoned
    by tokens of NaN that go first."""
    if name not in supported():
        pytest.skip(f"this CPU has no {name}")
    cpp.set_instructions(name)
    w13, f13, w2, f2 = wide_layer()
    x, weights = torch.randn(40, 512), torch.rand(40, 3)
    ids = torch.rand(40, 8).topk(3).indices.int()
    ids[7] = -1

    def layer(rows: torch.Tensor) -> torch.Tensor:
        poison = torch.full((len(rows), 512), math.nan)
        cpp.experts(poison, weights[rows], ids[rows], w13, f13, w2, f2)
        return cpp.experts(x[rows], weights[rows], ids[rows], w13, f13, w2, f2)

    whole = layer(torch.arange(40))
    assert whole.isfinite().all() and not whole[7].any()
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        for rows in (torch.arange(40), torch.randperm(40), torch.arange(5), torch.tensor([39, 7]), torch.tensor([12])):
            assert torch.equal(layer(rows), whole[rows]), (num_threads, rows)


def test_calls_from_several_python_threads() -> None:
    w13, f13, w2, f2 = wide_layer()
    ids, weights = torch.rand(20, 8).topk(2).indices.int(), torch.rand(20, 2)
    inputs = [torch.randn(20, 512) for _ in range(3)]
    expected = [cpp.experts(x, weights, ids, w13, f13, w2, f2) for x in inputs]
    torch.set_num_threads(2)
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(10):
            wrong.extend([i] * (not torch.equal(cpp.experts(inputs[i], weights, ids, w13, f13, w2, f2), expected[i])))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_interface_takes_this_backend_on_a_cpu() -> None:
    assert api.load_backend("auto") is cpp
    w = torch.randn(1, 8, 64)
    of = api.quantize(w, 3, 64, 4)
    assert_same(api.dequantize(of), reference.dequantize(reference.quantize(w, 3, 64, 4)), "auto")
    assert api.linear(torch.randn(2, 64).bfloat16(), of).dtype == torch.bfloat16


def test_what_it_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="no instruction set sse9"):
        cpp.set_instructions("sse9")
    w13, f13, w2, f2 = wide_layer()
    with pytest.raises(MoEError, match="numbered below 8; got 8"):
        cpp.experts(torch.zeros(1, 512), torch.ones(1, 1), torch.tensor([[8]]).int(), w13, f13, w2, f2)
