"""The codec's Triton kernels against their PyTorch specification, bit for bit.

On CPU they run in Triton's interpreter, in subprocesses of this file, because `TRITON_INTERPRET` must be set before
Triton is imported and vLLM must not see it. On CUDA the compiled kernels run here. Without a GPU too, they are compiled
for sm_90 and the PTX is searched for what equality rests on.
"""

from __future__ import annotations

import collections
import itertools
import math
import os
import re
import subprocess
import sys

import pytest
import torch

from rl_accel.kernels.codec.api import dequantize, dequantize_rows, quantize, quantize_rows, requantize
from rl_accel.kernels.codec.layout import packed_bytes
from rl_accel.kernels.codec.rows import Rows
from rl_accel.kernels.common.noise import fold_key, rounding_noise

FORMATS = [(4, 32), (4, 128), (4, 2048), (8, 32), (8, 512)]
LARGE_GROUPS = [(4, 32768), (8, 8192)]
SIZES = [0, 1, 31, 33, 128, 1000, 5000]
CUDA_SIZES = [*SIZES, 65_537, 10_000_019]
DTYPES = [torch.float32, torch.bfloat16]
GUARD = 64
"""Bytes or values around a tensor that must neither be written nor matter."""


def values(numel: int, seed: int = 0) -> torch.Tensor:
    """Normal values whose runs of 32 differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator)
    return x * torch.exp(3 * torch.randn(-(-numel // 32), generator=generator)).repeat_interleave(32)[:numel]


def guarded(x: torch.Tensor, device: str, shift: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy in the middle of a larger buffer of NaN, or of bytes 255, and the buffer."""
    buffer = torch.full((x.numel() + 2 * GUARD,), 255 if x.dtype == torch.uint8 else math.nan, dtype=x.dtype)
    buffer = buffer.to(device)
    inside = buffer[shift : shift + x.numel()].view(x.shape)
    inside.copy_(x)
    return inside, buffer


def untouched(buffer: torch.Tensor, numel: int, shift: int = 16) -> bool:
    rest = torch.cat([buffer[:shift], buffer[shift + numel :]])
    return bool((rest == 255).all() if buffer.dtype == torch.uint8 else rest.isnan().all())


def assert_same_values(got: torch.Tensor, want: torch.Tensor, what: object) -> None:
    got = got.cpu()
    words = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[want.dtype]
    same = (got.view(words) == want.view(words)) | (got.isnan() & want.isnan())
    assert got.dtype == want.dtype and same.all(), (what, (~same).nonzero().view(-1)[:8], got[~same], want[~same])


def assert_same_block(got: torch.Tensor, want: torch.Tensor, numel: int, bits: int, group: int, what: object) -> None:
    num_code_bytes = -(-numel // group) * group * bits // 8
    codes = got.cpu()[:num_code_bytes], want[:num_code_bytes]
    assert torch.equal(*codes), (what, (codes[0] != codes[1]).nonzero().view(-1)[:8])
    if numel:
        scales = [block.cpu()[num_code_bytes:].view(torch.float32) for block in (got, want)]
        assert_same_values(*scales, what)


def check_quantize(device: str, x: torch.Tensor, bits: int, group: int, subtract=None, shift: int = 16, **options):
    what = (x.numel(), x.dtype, bits, group, subtract is not None, options)
    want = quantize(x, bits, group, subtract=subtract, backend="torch", **options)
    out, buffer = guarded(torch.full_like(want, 255), device, shift)
    held = None if subtract is None else guarded(subtract, device)[0]
    quantize(guarded(x, device)[0], bits, group, subtract=held, out=out, backend="triton", **options)
    assert_same_block(out, want, x.numel(), bits, group, what)
    assert untouched(buffer, out.numel(), shift), what
    return want


def check_dequantize(device: str, blocks: torch.Tensor, out: torch.Tensor, bits: int, group: int, shift=16, **options):
    what = (out.numel(), out.dtype, bits, group, blocks.shape[0], options)
    want = dequantize(blocks, out.numel(), bits, group, out=out.clone(), backend="torch", **options)
    got, buffer = guarded(out, device)
    held = guarded(blocks, device, shift)[0]
    dequantize(held, out.numel(), bits, group, out=got, backend="triton", **options)
    assert_same_values(got, want, what)
    assert untouched(buffer, out.numel()), what


def check_requantize(device: str, blocks: torch.Tensor, numel: int, source, target, shift: int = 16, **options):
    what = (numel, source, target, blocks.shape[0], options)
    want = requantize(blocks, numel, *source, *target, backend="torch", **options)
    out, buffer = guarded(torch.full_like(want, 255), device, shift)
    requantize(guarded(blocks, device)[0], numel, *source, *target, out=out, backend="triton", **options)
    assert_same_block(out, want, numel, *target, what)
    assert untouched(buffer, out.numel(), shift), what


def blocks_of(num_blocks: int, numel: int, bits: int, group: int, hadamard: bool = False) -> torch.Tensor:
    parts = [values(numel, seed) for seed in range(num_blocks)]
    return torch.stack([quantize(part, bits, group, hadamard=hadamard, backend="torch") for part in parts])


def check_sizes(device: str, sizes: list[int]) -> None:
    for (bits, group), numel in itertools.product(FORMATS, sizes):
        x, held = values(numel), values(numel, 1)
        modes = itertools.product(("nearest", "stochastic"), (False, True))
        for number, (rounding, hadamard) in enumerate(modes):
            dtype, other = DTYPES[number & 1], DTYPES[number >> 1]
            subtract = held.to(other) if hadamard else None
            block = check_quantize(
                device, x.to(dtype), bits, group, subtract, rounding=rounding, hadamard=hadamard, seed=7, step=number
            )
            add = rounding == "nearest"
            check_dequantize(device, block[None], held.to(other), bits, group, hadamard=hadamard, add=add)


def check_large_groups(device: str) -> None:
    for (bits, group), numel in itertools.product(LARGE_GROUPS, (1, 40_000)):
        block = check_quantize(device, values(numel), bits, group, rounding="stochastic", hadamard=True)
        check_dequantize(device, block[None], torch.empty(numel), bits, group, hadamard=True)
        check_requantize(device, block[None], numel, (bits, group), (12 - bits, group), rounding="stochastic")


def check_dtypes(device: str) -> None:
    for dtype, other in itertools.product(DTYPES, DTYPES):
        for rounding in ("nearest", "stochastic"):
            check_quantize(device, values(1000).to(dtype), 4, 128, values(1000, 1).to(other), rounding=rounding)


def check_offsets(device: str) -> None:
    """Noise past 2^32 values, across it inside a tile, near 2^63, and keys of both signs."""
    x = values(5000)
    for offset in (128, (1 << 32) - 2048, (1 << 32) + 128, 3 << 40, (1 << 63) - 8192):
        for bits, group in ((4, 128), (8, 2048)):
            for seed in range(3):
                check_quantize(device, x, bits, group, rounding="stochastic", seed=seed, offset=offset // group * group)
    check_requantize(
        device, blocks_of(2, 5000, 8, 512), 5000, (8, 512), (4, 128), rounding="stochastic", offset=(1 << 32) - 2048
    )


def check_not_finite(device: str) -> None:
    for bad in (math.nan, -math.nan, math.inf, -math.inf):
        for hadamard, rounding in itertools.product((False, True), ("nearest", "stochastic")):
            x = values(1000)
            x[300], x[999] = bad, -bad
            for bits, group in ((4, 128), (8, 512)):
                block = check_quantize(device, x, bits, group, hadamard=hadamard, rounding=rounding)
                check_dequantize(device, block[None], values(1000), bits, group, hadamard=hadamard, add=True)
                check_dequantize(device, block[None], values(1000).bfloat16(), bits, group, hadamard=hadamard)
                check_requantize(device, torch.stack([block, block]), 1000, (bits, group), (4, 64))


def check_extremes(device: str) -> None:
    """Zeros, denormals, the limit below which groups are zeros, ties, the largest floats, and sums that overflow."""
    limit = 2.0**-100
    largest = torch.finfo(torch.float32).max
    rows = [
        [0.0, -0.0],
        [1e-45, -1e-42],
        [limit, -limit / 2],
        [limit * (1 - 2**-24), limit / 3],
        [-limit, 1e-39],
        [largest, -largest],
        [largest, 2.0**126],
        [7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -3.5],
        [127.0, 0.5, 1.5, 62.5, -63.5, -126.5],
        [1.0, 2.0**-23],
    ]
    x = torch.cat([torch.tensor(row).repeat(128 // len(row) + 1)[:128] for row in rows])
    for bits, group in ((4, 32), (4, 128), (8, 64)):
        for rounding, hadamard in itertools.product(("nearest", "stochastic"), (False, True)):
            block = check_quantize(device, x, bits, group, rounding=rounding, hadamard=hadamard)
            check_dequantize(device, block[None], x, bits, group, hadamard=hadamard, add=True)
            check_dequantize(device, block[None], x.bfloat16(), bits, group, hadamard=hadamard)
            check_dequantize(device, block[None], x, bits, group, hadamard=True)  # overflows if not rotated before
        check_requantize(device, torch.stack([block, block]), x.numel(), (bits, group), (4, 32))


def check_noise_at_its_ends(device: str) -> None:
    """Largest values that the noise would carry past the largest code."""
    key = fold_key(7, 0)
    draws = rounding_noise(key, 0, 1 << 22)
    for index, sign in ((draws.argmax().item(), 1.0), (draws.argmin().item(), -1.0)):
        assert round(127 * sign + draws[index].item(), 4) == 127.5 * sign
        check_quantize(device, torch.full((32,), sign), 8, 32, rounding="stochastic", seed=7, offset=index // 32 * 32)


def check_every_code(device: str) -> None:
    """All bytes, -8 and -128 too, which no encoder writes."""
    for bits, per_byte in ((4, 2), (8, 1)):
        numel = 256 * per_byte
        codes = torch.arange(256, dtype=torch.uint8)
        block = torch.cat([codes, torch.rand(numel // 32).view(torch.uint8)])
        check_dequantize(device, block[None], torch.empty(numel), bits, 32)


def check_sums(device: str) -> None:
    for num_blocks, numel in itertools.product((1, 2, 3, 4), (33, 5000)):
        for bits, group in ((4, 128), (8, 512)):
            for hadamard in (False, True):
                blocks = blocks_of(num_blocks, numel, bits, group, hadamard)
                check_dequantize(device, blocks, torch.empty(numel), bits, group, hadamard=hadamard)
                check_dequantize(device, blocks, values(numel, 9).bfloat16(), bits, group, hadamard=hadamard, add=True)


def check_requantizing(device: str) -> None:
    formats = [(4, 32), (8, 128), (4, 512), (8, 2048), (4, 8192)]
    for number, (source, target) in enumerate(itertools.product(formats, formats)):
        numel = (1, 33, 1000, 5000)[number % 4]
        rounding = ("nearest", "stochastic")[number // 4 % 2]
        blocks = blocks_of(1 + number % 3, numel, *source, hadamard=number % 2 == 0)
        check_requantize(device, blocks, numel, source, target, rounding=rounding, seed=number)


def check_alignment(device: str) -> None:
    """Buffers at multiples of 4 bytes, and sums of blocks whose size is one."""
    assert packed_bytes(100, 4, 128) % 16 == 4 and packed_bytes(300, 4, 128) % 16 == 12
    for shift, numel in itertools.product((4, 8, 12), (100, 300)):
        block = check_quantize(device, values(numel), 4, 128, shift=shift)
        check_dequantize(device, block.expand(3, -1).contiguous(), torch.empty(numel), 4, 128, shift=shift)
        check_requantize(device, torch.stack([block, block]), numel, (4, 128), (8, 128), shift=shift)


ROWS = {
    128: Rows.of(3, 1024, [(700, 1000, 0, 1024), (0, 130, 1280, 256), (200, 0, 2048, 128), (250, 257, 2304, 768)]),
    8192: Rows.of(2, 16384, [(5, 8000, 8192, 8192), (9100, 16384, 16384, 16384)]),
}
"""Group size -> pieces with gaps, empty ones and ones that end inside a group; of 2,000 and 26,000 values."""


def check_rows(device: str) -> None:
    for (group, rows), bits in itertools.product(ROWS.items(), (4, 8)):
        numel = 2000 if group == 128 else 26_000
        for dtype, hadamard in itertools.product(DTYPES, (False, True)):
            x, held = values(numel).to(dtype), values(numel, 1).to(dtype)
            options = {"rounding": "stochastic", "seed": 3, "offset": 5 * group, "hadamard": hadamard}
            before = torch.full((rows.num_rows, packed_bytes(rows.numel, bits, group)), 255, dtype=torch.uint8)
            want = quantize_rows(x, rows, bits, group, subtract=held, out=before.clone(), backend="torch", **options)
            out, buffer = guarded(before, device)
            inside = [guarded(tensor, device)[0] for tensor in (x, held)]
            quantize_rows(inside[0], rows, bits, group, subtract=inside[1], out=out, backend="triton", **options)
            assert torch.equal(out.cpu(), want), (bits, group, dtype, hadamard)
            assert untouched(buffer, out.numel())
            for layers, add in ((1, True), (3, False)):
                blocks = torch.stack([want.view(-1).roll(4 * layer) for layer in range(layers)])
                expected = dequantize_rows(
                    blocks, rows, held.clone(), bits, group, hadamard=hadamard, add=add, backend="torch"
                )
                got, buffer = guarded(held, device)
                blocks = guarded(blocks, device)[0]
                dequantize_rows(blocks, rows, got, bits, group, hadamard=hadamard, add=add, backend="triton")
                assert_same_values(got, expected, (bits, group, dtype, hadamard, layers))
                assert untouched(buffer, got.numel())


CHECKS = {
    "sizes": lambda device: check_sizes(device, CUDA_SIZES if device == "cuda" else SIZES),
    "large groups": check_large_groups,
    "dtypes": check_dtypes,
    "offsets": check_offsets,
    "not finite": check_not_finite,
    "extremes": check_extremes,
    "noise at its ends": check_noise_at_its_ends,
    "every code": check_every_code,
    "sums": check_sums,
    "requantizing": check_requantizing,
    "alignment": check_alignment,
    "rows": check_rows,
}


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; the interpreter is tested below")
def test_on_cuda(name):
    CHECKS[name]("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_another_stream():
    """Kernels go to the current stream: one that waits for the values sees them."""
    x = values(1 << 22)
    want = quantize(x, backend="torch")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        got = quantize(x.pin_memory().to("cuda", non_blocking=True), backend="triton")
    stream.synchronize()
    assert torch.equal(got.cpu(), want)


def run_this_file(*arguments: str, **env: str) -> list[str]:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize("names", [["sizes"], [name for name in CHECKS if name != "sizes"]], ids=["sizes", "special"])
def test_in_the_interpreter(names):
    assert run_this_file("interpret", *names, TRITON_INTERPRET="1") == [f"ok {name}" for name in names]


def test_compiled_kernels_round_as_the_specification(tmp_path):
    """What a launch compiles for sm_90 has no fused multiply-add, no flushing of denormals, only rounded divisions and
    conversions, and reads and writes in words."""
    assert run_this_file("compile", TRITON_CACHE_DIR=str(tmp_path)) == [
        *(f"ok {name}" for name in COMPILED),
        "ok one kernel for all keys",
    ]


COMPILED = {
    "quantize": lambda: quantize(values(4096), backend="triton"),
    "quantize one value": lambda: quantize(values(1), backend="triton"),
    "quantize to a multiple of 4 bytes": lambda: quantize(
        values(4096),
        out=guarded(torch.empty(packed_bytes(4096, 4, 128), dtype=torch.uint8), "cpu", 4)[0],
        backend="triton",
    ),
    "quantize differences": lambda: quantize(
        values(4096).bfloat16(), 4, 2048, subtract=values(4096).bfloat16(), backend="triton"
    ),
    "quantize rotated": lambda: quantize(values(4096), 8, 512, "stochastic", hadamard=True, backend="triton"),
    "quantize a large group": lambda: quantize(values(4096), 4, 32768, "stochastic", hadamard=True, backend="triton"),
    "dequantize": lambda: dequantize(blocks_of(1, 4096, 4, 128), 4096, backend="triton"),
    "dequantize from a multiple of 4 bytes": lambda: dequantize(
        guarded(blocks_of(1, 4096, 4, 128), "cpu", 4)[0], 4096, backend="triton"
    ),
    "dequantize 8 bits from a multiple of 4 bytes": lambda: dequantize(
        guarded(blocks_of(1, 4096, 8, 128), "cpu", 4)[0], 4096, 8, 128, backend="triton"
    ),
    "dequantize, add": lambda: dequantize(
        blocks_of(1, 4096, 4, 2048), 4096, 4, 2048, out=values(4096).bfloat16(), add=True, backend="triton"
    ),
    "dequantize a rotated sum": lambda: dequantize(blocks_of(4, 4096, 4, 128), 4096, hadamard=True, backend="triton"),
    "quantize rows": lambda: quantize_rows(values(2000), ROWS[128], 4, 128, hadamard=True, backend="triton"),
    "dequantize rows": lambda: dequantize_rows(
        quantize_rows(values(2000), ROWS[128], 4, 128, backend="torch").view(1, -1),
        ROWS[128],
        torch.zeros(2000),
        backend="triton",
    ),
    "requantize": lambda: requantize(blocks_of(4, 4096, 8, 512), 4096, 8, 512, 4, 128, "stochastic", backend="triton"),
    "requantize one group": lambda: requantize(blocks_of(2, 33, 8, 512), 33, 8, 512, 4, 8192, backend="triton"),
}


def check_ptx(name: str, ptx: str) -> None:
    ops = collections.Counter(re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w.:]*)\s", ptx, re.MULTILINE))
    of = lambda word: {op for op in ops if re.search(word, op)}  # noqa: E731
    assert not of(r"^(fma|mad)\..*f32|ftz|approx|\.full\."), (name, ops)
    assert not of(r"^(max|min)\..*f32"), (name, ops)  # drops NaN
    # Without .rn the assembler may fuse; a conversion of an integer below 2^24 is exact.
    assert of(r"^(add|sub|mul|div|rcp)\..*f32$") <= {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32"}, (
        name,
        ops,
    )
    assert of(r"^cvt.*f32|^cvt.*bf16") <= {
        *("cvt.rn.f32.s32", "cvt.rn.f32.u32", "cvt.rn.f32.s16", "cvt.f32.bf16", "cvt.rn.bf16.f32", "cvt.rn.bf16x2.f32")
    }, (name, ops)
    assert bool(of(r"^div")) == ("dequantize" not in name), (name, ops)
    assert bool(of(r"bf16x?2?\.f32$")) == (name == "dequantize, add"), (name, ops)
    if "rotated" in name:
        assert of(r"^shfl") and not of(r"stmatrix"), (name, ops)
    if "one" not in name:  # else the masks differ
        assert not of(r"^(ld|st)\.global\.b(8|16)$"), (name, ops)


def compile_all() -> None:
    """Compile for an H100 that is not there: the driver only says which target, and launches end after compiling."""
    import triton
    from triton.backends.compiler import GPUTarget

    from rl_accel.kernels.codec import triton as triton_kernels

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    triton.runtime.driver.set_active(Driver())
    kernels: list[triton.compiler.CompiledKernel] = []
    run = triton.JITFunction.run
    triton.JITFunction.run = lambda self, *args, warmup, **options: kernels.append(
        run(self, *args, warmup=True, **options)
    )
    for name, call in COMPILED.items():
        kernels.clear()
        call()
        assert len(kernels) == 1
        check_ptx(name, kernels[0].asm["ptx"])
        print("ok", name)
    kernels.clear()
    for key, offset in itertools.product((0, 1, 16, 1 << 40, (1 << 64) - 1), (0, 128, 1 << 40)):
        triton_kernels.quantize(
            quantize(values(128), backend="torch"), values(128), None, 4, 128, True, key, offset, False
        )
    assert len(set(kernels)) == 1, "a new key or offset compiled a new kernel"
    print("ok one kernel for all keys")


def interpret(names: list[str]) -> None:
    from triton import language as tl
    from triton.runtime import interpreter

    # The interpreter cuts a float32 off to make a bfloat16; the GPU's instruction rounds, as the PTX shows.
    convert = interpreter._convert_float

    def rounded(x, from_dtype, to_dtype, mode):
        if (from_dtype, to_dtype) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(x.copy()).bfloat16().view(torch.uint16).numpy()
        return convert(x, from_dtype, to_dtype, mode)

    interpreter._convert_float = rounded
    for name in names:
        CHECKS[name]("cpu")
        print("ok", name)


if __name__ == "__main__":
    compile_all() if sys.argv[1] == "compile" else interpret(sys.argv[2:])
