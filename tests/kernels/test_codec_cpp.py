"""The codec's C++ against its specification, bit for bit: every instruction set that this CPU has."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_accel.kernels.codec import _codec, cpp, reference
from rl_accel.kernels.codec import api as codec
from rl_accel.kernels.codec.layout import max_code, packed_bytes, padded
from rl_accel.kernels.codec.rows import Rows
from rl_accel.kernels.common.noise import rounding_noise

INSTRUCTIONS = ("scalar", "avx2", "avx512")
DTYPES = (torch.float32, torch.bfloat16)
SIZES = (0, 1, 31, 33, 128, 1000, 2047, 2049, 5000)
GUARD = 64
"""Bytes around a buffer that a call must leave alone."""


def supported() -> list[str]:
    found = []
    for name in INSTRUCTIONS:
        try:
            _codec.set_instructions(name)
        except ValueError:
            continue
        found.append(name)
    _codec.set_instructions("auto")
    return found


@pytest.fixture
def num_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def defaults(num_threads):
    """One thread, since the specification's would only wait for each other; afterwards the usual instructions."""
    num_threads(1)
    yield
    _codec.set_instructions("auto")


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request):
    if request.param not in supported():
        pytest.skip(f"this CPU has no {request.param}")
    _codec.set_instructions(request.param)
    return request.param


def values(numel: int, kind: str, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator)
    x *= torch.exp(3 * torch.randn(-(-numel // 32), generator=generator)).repeat_interleave(32)[:numel]
    if kind == "bits":  # any float at all: NaN, infinities, denormals, -0.0
        x = torch.randint(-(2**31), 2**31, (numel,), generator=generator).to(torch.int32).view(torch.float32)
    elif kind == "ties":
        x = x.round().clamp(-7, 7) / 2
        x[::32] = 7
    elif kind == "tiny":
        x *= 1e-31  # on both sides of TINY; some denormal
        x[::3] *= 1e-10
    elif kind == "huge":
        x = x.sign() * (x.abs() * 1e37).clamp(max=3.4e38)
    elif kind == "zeros":
        x = torch.where(x > 0, 0.0, -0.0)
    elif kind == "spoilt" and numel:
        bad = torch.tensor([torch.nan, torch.inf, -torch.inf])
        x[torch.randint(numel, (1 + numel // 500,), generator=generator)] = bad[seed % 3]
    return x.to(dtype)


KINDS = ("normal", "bits", "ties", "tiny", "huge", "zeros", "spoilt")


class Guarded:
    """A buffer full of NaN or 0xA5 that starts `shift` values behind an aligned address, between guards."""

    def __init__(self, numel: int, dtype: torch.dtype, shift: int = 0):
        margin = GUARD // dtype.itemsize
        self.whole = torch.full((numel + 2 * margin + shift,), 0xA5 if dtype == torch.uint8 else torch.nan, dtype=dtype)
        self.inside = self.whole[margin + shift : margin + shift + numel]
        self.before = self.whole[: margin + shift].view(torch.uint8).clone()
        self.after = self.whole[margin + shift + numel :].view(torch.uint8).clone()

    def check(self) -> None:
        whole, size = self.whole.view(torch.uint8), self.whole.numel() * self.whole.itemsize
        assert torch.equal(whole[: self.before.numel()], self.before)
        assert torch.equal(whole[size - self.after.numel() :], self.after)


def shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """A copy that starts `by` values behind an aligned address."""
    out = torch.empty(x.numel() + by, dtype=x.dtype)[by:]
    return out.copy_(x)


def check_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal bits, or NaN in both."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[ours.itemsize]
    same = ours.view(bits) == theirs.view(bits)
    if ours.is_floating_point():
        same |= torch.isnan(ours) & torch.isnan(theirs)
    wrong = (~same).nonzero().flatten()
    assert not wrong.numel(), f"{wrong.numel()} differ, first at {wrong[:5].tolist()}"


def check_quantize(x, subtract, bits, group_size, stochastic, key, offset, hadamard) -> torch.Tensor:
    args = (x, subtract, bits, group_size, stochastic, key, offset, hadamard)
    theirs = torch.empty(packed_bytes(x.numel(), bits, group_size), dtype=torch.uint8)
    reference.quantize(theirs, *args)
    ours = Guarded(theirs.numel(), torch.uint8, 4)
    cpp.quantize(ours.inside, *args)
    check_equal(ours.inside, theirs)
    ours.check()
    return theirs


def check_dequantize(blocks, held, bits, group_size, hadamard, add) -> None:
    theirs = held.clone()
    reference.dequantize(theirs, blocks, bits, group_size, hadamard, add)
    ours = Guarded(held.numel(), held.dtype, 1)
    if add:
        ours.inside.copy_(held)
    cpp.dequantize(ours.inside, blocks, bits, group_size, hadamard, add)
    check_equal(ours.inside, theirs)
    ours.check()


def check_requantize(blocks, numel, from_bits, from_group_size, bits, group_size, stochastic, key, offset) -> None:
    args = (blocks, numel, from_bits, from_group_size, bits, group_size, stochastic, key, offset)
    theirs = torch.empty(packed_bytes(numel, bits, group_size), dtype=torch.uint8)
    reference.requantize(theirs, *args)
    ours = Guarded(theirs.numel(), torch.uint8, 4)
    cpp.requantize(ours.inside, *args)
    check_equal(ours.inside, theirs)
    ours.check()


def random_rows(seed: int, group_size: int) -> tuple[Rows, int]:
    """Rows in which pieces of a tensor lie in any order, some empty, with gaps; and how many values the tensor has."""
    generator = torch.Generator().manual_seed(seed)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    num_rows, groups_per_row = 1 + below(4), 1 + below(40)
    pieces, start = [], 0
    for row in range(num_rows):
        group = 0
        while group < groups_per_row:
            span = min(1 + below(12), groups_per_row - group)
            count = below(span * group_size + 1)
            if below(4):
                pieces.append((start, count, (row * groups_per_row + group) * group_size, span * group_size))
                start += count + below(3)
            group += span
    rows = Rows.of(num_rows, groups_per_row * group_size, [pieces[i] for i in torch.randperm(len(pieces))])
    rows.check_integrity(group_size)
    return rows, start + 7


def check_rows(seed, kind, dtype, other, bits, group_size, stochastic, hadamard, add) -> None:
    rows, numel = random_rows(seed, group_size)
    x = shifted(values(numel, kind, dtype, seed), seed % 9)
    subtract = None if other is None else values(numel, kind, other, seed + 1)
    num_bytes = rows.num_rows * packed_bytes(rows.numel, bits, group_size)
    theirs = torch.full((num_bytes,), 0xA5, dtype=torch.uint8)
    args = (rows, x, subtract, bits, group_size, stochastic, 3, 5 * group_size, hadamard)
    reference.quantize_rows(theirs, *args)
    ours = Guarded(num_bytes, torch.uint8, 4)
    cpp.quantize_rows(ours.inside, *args)
    check_equal(ours.inside, theirs)
    ours.check()
    for layers in (1, 3):
        blocks = torch.stack([theirs.roll(4 * layer) for layer in range(layers)])
        held = values(numel, kind, dtype, seed + 2)
        expected, got = held.clone(), Guarded(numel, dtype, 1)
        got.inside.copy_(held)
        reference.dequantize_rows(expected, blocks, rows, bits, group_size, hadamard, add)
        cpp.dequantize_rows(got.inside, blocks, rows, bits, group_size, hadamard, add)
        check_equal(got.inside, expected)
        got.check()


def blocks_of(numel: int, count: int, bits: int, group_size: int, any_bytes: bool, seed: int = 0) -> torch.Tensor:
    """Blocks of normal values, or any bytes at all; they start 4 bytes behind an aligned address."""
    num_bytes = packed_bytes(numel, bits, group_size)
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (4 + count * num_bytes,), generator=generator, dtype=torch.uint8)[4:]
    blocks = blocks.view(count, num_bytes)
    for number, block in enumerate([] if any_bytes else blocks):
        x = values(numel, "normal", torch.float32, seed + number)
        reference.quantize(block, x, None, bits, group_size, False, 0, 0, bool(number % 2))
    return blocks


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("bits,group_size", [(4, 32), (4, 128), (4, 4096), (8, 32), (8, 512), (8, 32768)])
def test_quantize(instructions, numel, bits, group_size) -> None:
    for number, kind in enumerate(KINDS):
        x = shifted(values(numel, kind, DTYPES[number % 2], seed=number), 1)
        for hadamard in (False, True):
            for stochastic in (False, True):
                check_quantize(x, None, bits, group_size, stochastic, 0x9876543210FEDCBA, group_size, hadamard)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("subtract_dtype", [None, *DTYPES])
@pytest.mark.parametrize("hadamard", [False, True])
def test_quantize_difference(instructions, x_dtype, subtract_dtype, hadamard) -> None:
    for numel in (33, 2500):
        for kind in KINDS:
            x = shifted(values(numel, kind, x_dtype), 1)
            subtract = None if subtract_dtype is None else shifted(values(numel, "normal", subtract_dtype, 5), 3)
            check_quantize(x, subtract, 4, 128, False, 0, 0, hadamard)


@pytest.mark.parametrize("bits,group_size", [(4, 32), (4, 128), (8, 256), (4, 8192)])
def test_noise_where_its_index_passes_32_bits(instructions, bits, group_size) -> None:
    x = values(20000, "normal", torch.float32)
    for offset in (2**32 - group_size, 2**32 - 8192, 2**32, 2**45 - 8192, 2**62):
        check_quantize(x, None, bits, group_size, True, 2**64 - 1, offset, False)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("index,sign", [(2984933, 1), (4029496, 1), (7934841, -1), (36451580, -1)])
def test_noise_does_not_lift_codes_out_of_range(instructions, bits, index, sign) -> None:
    """Once in millions of values the noise takes the largest to 7.5, which rounds to 8. With key 7, it does so here."""
    offset = index - index % 4096
    assert abs(rounding_noise(7, index, 1).item() - sign * 0.5) < 2e-7
    block = check_quantize(torch.full((4096,), float(sign)), None, bits, 128, True, 7, offset, False)
    codes = reference._unpack(block[: 512 * bits], bits)
    assert codes[index - offset] == sign * max_code(bits)


def test_noise_to_its_last_bit(instructions) -> None:
    """Values one step of the noise above where they would round down."""
    x = 0.5 - rounding_noise(7, 0, 4096) + 2.0**-24
    x[::128] = 7  # its inverse is 1
    block = check_quantize(x, None, 4, 128, True, 7, 0, False)
    codes = reference._unpack(block[:2048], 4).view(-1, 128)
    assert torch.all(codes[:, 1:] == 1)


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("bits,group_size", [(4, 32), (4, 128), (8, 64), (8, 4096)])
def test_dequantize(instructions, numel, bits, group_size) -> None:
    for count in (1, 2, 5):
        for any_bytes in (False, True):
            blocks = blocks_of(numel, count, bits, group_size, any_bytes)
            for dtype in DTYPES:
                for hadamard in (False, True):
                    for add in (False, True):
                        held = values(numel, "bits" if any_bytes else "normal", dtype, 9)
                        check_dequantize(blocks, held, bits, group_size, hadamard, add)


def test_every_byte_of_codes(instructions) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat_interleave(16)
    for bits, numel in ((4, 8192), (8, 4096)):
        scales = torch.full((numel // 128,), 0.3).view(torch.uint8)
        check_dequantize(torch.cat([codes, scales]).unsqueeze(0), torch.zeros(numel), bits, 128, False, False)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001])
def test_any_scale_that_is_nan_stays_nan_in_bfloat16(instructions, bits) -> None:
    """Rounded like a number, a NaN with the highest payload would become -0.0, one with the lowest infinity."""
    block = torch.cat([torch.full((64,), 0x11), torch.full((4,), 0)]).to(torch.uint8)
    block[64:].view(torch.int32)[0] = bits
    check_dequantize(block.unsqueeze(0), torch.zeros(128).bfloat16(), 4, 128, False, False)


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("formats", [(8, 512, 4, 128), (4, 32, 8, 4096), (8, 8192, 4, 32), (4, 128, 4, 128)])
def test_requantize(instructions, numel, formats) -> None:
    for count in (1, 3):
        for any_bytes in (False, True):
            blocks = blocks_of(numel, count, *formats[:2], any_bytes)
            for stochastic in (False, True):
                check_requantize(blocks, numel, *formats, stochastic, 2**63 + 5, 5 * formats[3])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_shape(data) -> None:
    draw = data.draw
    _codec.set_instructions(draw(st.sampled_from(supported())))
    numel = draw(st.integers(0, 9000))
    bits, group_size = draw(st.sampled_from((4, 8))), 2 ** draw(st.integers(5, 15))
    seed, key = draw(st.integers(0, 99)), draw(st.integers(0, 2**64 - 1))
    offset = group_size * draw(st.integers(0, 2**40))
    stochastic, hadamard, add = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    x = shifted(
        values(numel, draw(st.sampled_from(KINDS)), draw(st.sampled_from(DTYPES)), seed), draw(st.integers(0, 9))
    )
    other = draw(st.sampled_from((None, *DTYPES)))
    subtract = None if other is None else values(numel, draw(st.sampled_from(KINDS)), other, seed + 1)
    check_quantize(x, subtract, bits, group_size, stochastic, key, offset, hadamard)
    blocks = blocks_of(numel, draw(st.integers(1, 4)), bits, group_size, draw(st.booleans()), seed)
    held = values(numel, draw(st.sampled_from(KINDS)), draw(st.sampled_from(DTYPES)), seed + 2)
    check_dequantize(blocks, held, bits, group_size, hadamard, add)
    to_bits, to_group_size = draw(st.sampled_from((4, 8))), 2 ** draw(st.integers(5, 15))
    offset = to_group_size * draw(st.integers(0, 2**40))
    check_requantize(blocks, numel, bits, group_size, to_bits, to_group_size, stochastic, key, offset)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_rows(data) -> None:
    draw = data.draw
    _codec.set_instructions(draw(st.sampled_from(supported())))
    check_rows(
        draw(st.integers(0, 10**6)),
        draw(st.sampled_from(KINDS)),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from((None, *DTYPES))),
        draw(st.sampled_from((4, 8))),
        2 ** draw(st.integers(5, 13)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
    )


def test_one_row_of_everything_is_a_block() -> None:
    for numel in SIZES[1:]:
        x = values(numel, "normal", torch.float32)
        rows = Rows.of(1, padded(numel, 128), [(0, numel, 0, padded(numel, 128))])
        for rounding, hadamard in (("nearest", False), ("stochastic", True)):
            block = codec.quantize(x, 4, 128, rounding, 7, hadamard=hadamard)
            check_equal(codec.quantize_rows(x, rows, 4, 128, rounding, 7, hadamard=hadamard)[0], block)
            back = codec.dequantize_rows(block, rows, torch.zeros(numel), 4, 128, hadamard=hadamard)
            check_equal(back, codec.dequantize(block, numel, 4, 128, hadamard=hadamard))


@pytest.mark.parametrize(
    "pieces",
    [
        [(0, 10, 64, 128)],  # no multiple of the group
        [(0, 300, 0, 256)],  # more values than positions
        [(0, 10, 128, 256)],  # over the end of a row
        [(0, 10, 0, 128), (10, 10, 0, 128)],  # twice the same positions
        [(0, 10, 512, 128)],  # beyond the last row
        [(-1, 10, 0, 128)],
    ],
)
def test_rows_that_cannot_be_are_refused(pieces) -> None:
    with pytest.raises(codec.CommError, match="apart"):
        Rows.of(2, 256, pieces).check_integrity(128)


def test_rows_of_another_tensor_are_refused() -> None:
    rows = Rows.of(1, 128, [(100, 50, 0, 128)])
    with pytest.raises(codec.CommError, match="up to 150"):
        codec.quantize_rows(torch.zeros(149), rows)
    with pytest.raises(codec.CommError, match="whole groups"):
        codec.quantize_rows(torch.zeros(150), rows, 4, 256)


@pytest.mark.parametrize("group_size", [128, 32768])
def test_results_do_not_depend_on_threads(num_threads, group_size) -> None:
    numel = 5 * (1 << 19) + 17
    x, subtract = values(numel, "normal", torch.float32), values(numel, "normal", torch.bfloat16, 1)
    found = []
    for threads in (1, 2, 5):
        num_threads(threads)
        block, again = (torch.full((packed_bytes(numel, 4, group_size),), 0xA5, dtype=torch.uint8) for _ in range(2))
        back = torch.full((numel,), torch.nan)
        cpp.quantize(block, x, subtract, 4, group_size, True, 3, 0, True)
        blocks = torch.stack([block, block.roll(padded(numel, group_size) // 4)])
        cpp.dequantize(back, blocks, 4, group_size, True, False)
        cpp.requantize(again, blocks, numel, 4, group_size, 4, group_size, True, 4, 0)
        wide = torch.full((packed_bytes(numel, 8, 4096),), 0xA5, dtype=torch.uint8)
        cpp.requantize(wide, blocks, numel, 4, group_size, 8, 4096, False, 0, 0)
        rows = Rows.of(2, padded(numel, group_size), [(9, numel - 9, 0, padded(numel - 9, group_size))])
        both = torch.full((2 * block.numel(),), 0xA5, dtype=torch.uint8)
        cpp.quantize_rows(both, rows, x, subtract, 4, group_size, True, 3, 0, True)
        rows_back = torch.full((numel,), torch.nan)
        cpp.dequantize_rows(rows_back, both.view(1, -1), rows, 4, group_size, True, False)
        found.append((block, back, again, wide, both, rows_back))
    for others in found[1:]:
        for ours, theirs in zip(others, found[0], strict=True):
            check_equal(ours, theirs)


def test_calls_at_the_same_time_and_in_a_fork(num_threads) -> None:
    num_threads(2)
    numel = 1 << 21
    x = values(numel, "normal", torch.float32)
    outs = [torch.empty(packed_bytes(numel, 4, 128), dtype=torch.uint8) for _ in range(5)]

    def call(out: torch.Tensor) -> None:
        cpp.quantize(out, x, None, 4, 128, True, 1, 0, True)

    callers = [threading.Thread(target=call, args=(out,)) for out in outs[:4]]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for out in outs[1:4]:
        check_equal(out, outs[0])
    child = os.fork()
    if child == 0:  # without torch, whose own threads do not survive a fork
        call(outs[4])
        os._exit(0 if outs[4].numpy().tobytes() == outs[0].numpy().tobytes() else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_auto_takes_cpp_on_the_cpu() -> None:
    assert codec.load_backend("auto") is cpp
    x = values(1000, "normal", torch.float32)
    ours = codec.quantize(x, 4, 128, "stochastic", seed=3)
    check_equal(ours, codec.quantize(x, 4, 128, "stochastic", seed=3, backend="torch"))


def test_unknown_instructions_are_refused() -> None:
    with pytest.raises(ValueError, match="mmx"):
        _codec.set_instructions("mmx")
    assert _codec.instructions() == supported()[-1]
