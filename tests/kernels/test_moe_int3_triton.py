"""Triton kernels of quantized experts against their PyTorch specification: quantizers bit for bit, layers by tolerance.

On CPU they run in Triton's interpreter, in subprocesses of this file, because `TRITON_INTERPRET` must be set before
Triton is imported and vLLM must not see it; in float32 and float16, for products of bfloat16 are wrong there. On CUDA
the compiled kernels run here. Without a GPU too, they are compiled for sm_80 and sm_90, and what comes out is searched
for what equality and speed rest on.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tempfile

import pytest
import torch

from rl_accel.errors import MoEError
from rl_accel.kernels.moe_int3 import api, reference
from rl_accel.kernels.moe_int3.layout import Factors, QuantizedMatrix

TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Of a result, relative to the largest: sums of another order in float32; below, two roundings of activations."""
LAYERS = [  # bits, group size, hidden, intermediate, experts, slots, tokens, ranks
    (3, 64, 128, 64, 2, 2, 3, [3, 17]),
    (3, 32, 96, 32, 2, 1, 3, None),
    (2, 64, 64, 64, 1, 1, 18, [2]),
    (4, 32, 64, 32, 2, 2, 4, [0, 1]),
]


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compensators(ranks: list[int], rows: int, length: int) -> Factors:
    v_codes, v_scales = reference.quantize_factor(normal(sum(ranks), length, seed=21) * 0.2, 2)
    u_codes, u_scales = reference.quantize_factor(normal(sum(ranks), rows, seed=22) * 0.2, 2)
    return Factors(v_codes, v_scales, u_codes, u_scales, torch.tensor([0, *ranks]).cumsum(0).int())


def layer(number: int):
    bits, group_size, hidden, intermediate, num_experts, slots, num_tokens, ranks = LAYERS[number]
    w13 = reference.quantize(normal(num_experts, 2 * intermediate, hidden, seed=1), bits, group_size, 2)
    w2 = reference.quantize(normal(num_experts, hidden, intermediate, seed=2) * 0.1, bits, group_size, 2)
    factors = (None, None)
    if ranks:
        factors = compensators(ranks, 2 * intermediate, hidden), compensators(ranks[::-1], hidden, intermediate)
    x = normal(num_tokens, hidden, seed=3)
    generator = torch.Generator().manual_seed(4)
    ids = torch.stack([torch.randperm(num_experts, generator=generator)[:slots] for _ in range(num_tokens)]).int()
    ids[1, 0] = -1  # an expert of another rank
    weights = torch.rand(num_tokens, slots, generator=generator)
    return x, weights, ids, w13, factors[0], w2, factors[1]


def to(device: str, value):
    """Tensors, and what holds tensors, on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, QuantizedMatrix | Factors):
        return type(value)(**{name: to(device, item) for name, item in vars(value).items()})
    return value


def assert_close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, what: object) -> None:
    difference = float((got.cpu().float() - want.float()).abs().max() / want.float().abs().max())
    assert difference < TOLERANCES[dtype], (what, dtype, difference)


def assert_same(got: torch.Tensor, want: torch.Tensor, what: object) -> None:
    """Equal values; NaN equals NaN, and the sign of a zero is free."""
    got = got.cpu()
    assert got.dtype == want.dtype and got.shape == want.shape, what
    assert ((got == want) | (got.isnan() & want.isnan())).all(), (what, int((got != want).sum()))


def check_quantize(device: str) -> None:
    for bits, group_size, length, iterations in ((3, 64, 128, 4), (3, 32, 96, 3), (2, 64, 64, 0), (4, 32, 64, 3)):
        w = normal(2, 20, length, seed=bits)
        w[0, 0, 3], w[0, 1, 5], w[0, 2, 1] = math.nan, math.inf, -math.inf
        w[1, 0], w[1, 1], w[1, 2] = 0.3, 0.0, w[1, 2] * 1e-7  # equal values, zeros, a scale that is subnormal
        w[1, 3, 7] = 1e6  # beyond float16
        w[1, 4] = torch.arange(length) / 2.0  # halves, which round to even
        want = api.quantize(w, bits, group_size, iterations, backend="torch")
        got = api.quantize(w.to(device), bits, group_size, iterations, backend="triton")
        got.check_integrity()
        for name in ("codes", "scales", "offsets"):
            assert_same(getattr(got, name), getattr(want, name), (bits, group_size, name))
        assert want.scales.isnan().any() and not want.scales.isnan().all()
        assert_same(
            api.dequantize(to(device, want), backend="triton"), api.dequantize(want, backend="torch"), "dequantize"
        )


def check_factors(device: str) -> None:
    from rl_accel.kernels.moe_int3 import triton as kernels

    x = normal(5, 160, seed=9)
    x[2], x[3] = 0.0, x[3] * 1e-7
    for iterations in (0, 3):
        for got, want in zip(
            kernels.quantize_factor(x.to(device), iterations), reference.quantize_factor(x, iterations), strict=True
        ):
            assert_same(got, want, iterations)


def check_planes(device: str) -> None:
    """Every code stands where the header of `triton_planes.py` says, and no byte is more than in the layout."""
    from rl_accel.kernels.moe_int3.triton_planes import to_planes

    for bits, length in ((2, 64), (3, 96), (4, 128)):
        matrix = api.quantize(normal(2, 70, length, seed=bits), bits, 32, 1, backend="torch")
        factors = compensators([2, 3], 70, length)
        planes = to_planes(to(device, matrix), to(device, factors))
        want = reference.unpack(matrix.codes, bits, -(-length // 64) * 64).long()
        size = 8 if bits == 4 else 16  # codes of a word
        width = 4 if bits == 4 else 2
        words = planes.low.cpu().long()
        for k in range(want.shape[-1]):
            block, word, pair, half = k // 64, k % 64 // size, k % size // 2, k % 2
            code = (words[:, block, :, word] >> (width * pair + 16 * half)) & ((1 << width) - 1)
            if bits == 3:
                code |= ((planes.high.cpu().long()[:, block, :, word] >> (pair + 8 * half)) & 1) << 2
            assert torch.equal(code, want[:, :, k]), (bits, k)
        scales = planes.affine.cpu().view(torch.float16).view(*planes.affine.shape, 2)
        assert torch.equal(scales[..., 0].transpose(1, 2), matrix.scales)
        assert torch.equal(scales[..., 1].transpose(1, 2), matrix.offsets)
        held = [planes.low, planes.affine] + ([planes.high] if bits == 3 else [])
        assert sum(x.nbytes for x in held) == matrix.memory_bytes()
        assert planes.factors.max_rank == 3
        want = reference.unpack(factors.u_codes, 4, 128).long()
        for n in range(128):
            code = planes.factors.u.cpu().long()[n // 64, :, n % 64 // 8] >> (4 * (n % 8 // 2) + 16 * (n % 2))
            assert torch.equal(code & 15, want[:, n]), n


def check_align(device: str) -> None:
    from rl_accel.kernels.moe_int3 import triton as kernels

    for num_experts, num_pairs, block_m in ((5, 17, 16), (3, 1, 16), (2, 1100, 32)):
        ids = torch.randint(-1, num_experts, (num_pairs,), generator=torch.Generator().manual_seed(5)).int()
        pairs, experts = (x.cpu() for x in kernels.align(ids.to(device), num_experts, block_m))
        want = []
        for expert in range(num_experts):
            own = [pair for pair in range(num_pairs) if ids[pair] == expert]
            for start in range(0, len(own), block_m):
                block = own[start : start + block_m]
                want.append((expert, block + [-1] * (block_m - len(block))))
        assert experts.tolist() == [expert for expert, _ in want] + [-1] * (len(experts) - len(want))
        assert pairs[: len(want)].tolist() == [block for _, block in want]


def check_layers(device: str, *numbers: int) -> None:
    for number in numbers:
        x, *rest = layer(number)
        w13, w13_factors = rest[2:4]
        last = w13.num_matrices - 1
        want_one = reference.linear(x, w13, w13_factors, last)
        dtypes = [torch.float32, torch.float16, torch.bfloat16]
        if device == "cpu":  # one each, for the interpreter takes its time
            dtypes = [torch.float32 if number % 2 else torch.float16]
        for dtype in dtypes:
            rounded = x.to(dtype)
            want = reference.experts(rounded.float(), *rest)
            got = api.experts(rounded.to(device), *(to(device, item) for item in rest), backend="triton")
            assert got.dtype == dtype
            assert_close(got, want, dtype, (number, "experts"))
        one = api.linear(x.to(device), to(device, w13), to(device, w13_factors), last, backend="triton")
        assert_close(one, want_one, torch.float32, (number, "linear"))


def check_rows(device: str) -> None:
    """A token's row has the same bits in any batch of one BLOCK_M, and whether programs have 64 or 128 rows."""
    from rl_accel.kernels.moe_int3 import triton as kernels
    from rl_accel.kernels.moe_int3.triton_planes import to_planes

    x, weights, ids, w13, f13, w2, f2 = (to(device, item) for item in layer(3))
    x = x.half()
    w13, w2 = to_planes(w13, f13), to_planes(w2, f2)

    def rows(chosen: list[int]) -> torch.Tensor:
        return kernels.experts(x[chosen], weights[chosen], ids[chosen], w13, None, w2, None)

    whole = rows([0, 1, 2, 3])
    assert whole.float().std(0).min() > 0
    assert torch.equal(rows([2, 2, 0] * 5), whole[[2, 2, 0] * 5])  # 30 pairs of two experts: BLOCK_M is 16 still
    enough = kernels.ENOUGH_PROGRAMS
    try:
        kernels.ENOUGH_PROGRAMS = 1
        assert torch.equal(rows([3, 0]), whole[[3, 0]])
    finally:
        kernels.ENOUGH_PROGRAMS = enough
    x[2] = math.nan
    poisoned = rows([0, 1, 2, 3])
    assert torch.equal(poisoned[[0, 1, 3]], whole[[0, 1, 3]]) and poisoned[2].isnan().all()


def check_arguments(device: str) -> None:
    from rl_accel.kernels.moe_int3 import triton as kernels

    x, weights, ids, w13, f13, w2, f2 = (to(device, item) for item in layer(3))
    with pytest.raises(MoEError, match="x must have rows of 64"):
        api.linear(x[:, :32], w13, f13, 0, backend="triton")
    with pytest.raises(MoEError, match="ranks of at most 128"):
        api.linear(x, w13, to(device, compensators([129, 0], 64, 64)), 0, backend="triton")
    none = api.experts(x, weights, torch.full_like(ids, -1), w13, f13, w2, f2, backend="triton")
    assert torch.equal(none, torch.zeros_like(x))
    assert api.experts(x[:0], weights[:0], ids[:0], w13, f13, w2, f2, backend="triton").shape == (0, 64)
    assert kernels.linear(x[:0], w13, f13, 0).shape == (0, 64)
    wide = torch.cat([x, x], 1)[:, :64]  # rows at a stride
    assert torch.equal(kernels.linear(wide, w13, None, 0), kernels.linear(x, w13, None, 0))


CHECKS = {
    "quantize": check_quantize,
    "factors": check_factors,
    "planes": check_planes,
    "align": check_align,
    "layers 0 1": lambda device: check_layers(device, 0, 1),
    "layers 2 3": lambda device: check_layers(device, 2, 3),
    "rows": check_rows,
    "arguments": check_arguments,
}


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; the interpreter is tested below")
def test_on_cuda(name: str) -> None:
    CHECKS[name]("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_graph_follows_the_router() -> None:
    from rl_accel.kernels.moe_int3 import triton as kernels
    from rl_accel.kernels.moe_int3.triton_planes import to_planes

    x, weights, ids, w13, f13, w2, f2 = (to("cuda", item) for item in layer(0))
    w13, w2 = to_planes(w13, f13), to_planes(w2, f2)
    kernels.experts(x, weights, ids, w13, None, w2, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.experts(x, weights, ids, w13, None, w2, None)
    ids.copy_(ids.flip(0))
    graph.replay()
    assert torch.equal(out, kernels.experts(x, weights, ids, w13, None, w2, None))


def run_this_file(*arguments: str, **env: str) -> list[str]:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [line for line in done.stdout.splitlines() if line.startswith("ok ")]


def test_in_the_interpreter() -> None:
    assert run_this_file("interpret", *CHECKS, TRITON_INTERPRET="1") == [f"ok {name}" for name in CHECKS]


def test_compiled_kernels(tmp_path) -> None:
    """What launches compile for GPUs that are not there."""
    lines = run_this_file("compile", "80", "90", TRITON_CACHE_DIR=str(tmp_path))
    assert lines == ["ok experts 80", "ok quantize 90", "ok experts 90"]


def operations(ptx: str) -> set[str]:
    return set(re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w.:]*)\s", ptx, re.MULTILINE))


def check_exact(name: str, ptx: str) -> None:
    """No fused multiply-add, no flushing, rounded division: what the quantizers' equal bits rest on."""
    ops = {op for op in operations(ptx) if re.search(r"f32|ftz|approx", op)}
    assert not {op for op in ops if re.search(r"^(fma|mad)|ftz|approx|\.full\.", op)}, (name, ops)
    arithmetic = {op for op in ops if re.search(r"^(add|sub|mul|div|rcp)\.", op)}
    assert arithmetic <= {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32"}, (name, ops)
    assert ("div.rn.f32" in ops) == (name != "dequantize"), (name, ops)


def spilled_bytes(cubin: bytes) -> int:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def check_gemm(name: object, kernel, capability: int) -> None:
    ops = operations(kernel.asm["ptx"])
    product = r"^wgmma\.mma_async" if capability == 90 else r"^mma\.sync.*m16n8k16"
    assert any(re.search(product, op) for op in ops), (name, ops)
    assert any(op.startswith("cp.async") for op in ops), (name, ops)
    assert not any(op.startswith(("atom", "red")) for op in ops), (name, ops)
    assert spilled_bytes(kernel.asm["cubin"]) == 0, name


def compile_all(capability: int) -> None:
    """The driver only says which target, and launches end after compiling."""
    import triton
    from triton.backends.compiler import GPUTarget

    from rl_accel.kernels.moe_int3 import triton as backend
    from rl_accel.kernels.moe_int3.triton_planes import PlaneFactors, PlaneMatrix

    class Driver:  # a device each, for kernels are kept by device
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: capability)
        get_current_stream = staticmethod(lambda device: 0)

    triton.runtime.driver.set_active(Driver())
    kernels: list[triton.compiler.CompiledKernel] = []
    run = triton.JITFunction.run
    triton.JITFunction.run = lambda self, *args, warmup, **options: kernels.append(
        run(self, *args, warmup=True, **options)
    )
    if capability == 90:
        matrix = backend.quantize(torch.zeros(2, 8, 128), 3, 64, 5)
        backend.quantize_factor(torch.zeros(2, 128), 2)
        backend.dequantize(matrix)
        for name, kernel in zip(("quantize", "factor", "dequantize"), kernels, strict=True):
            check_exact(name, kernel.asm["ptx"])
            assert spilled_bytes(kernel.asm["cubin"]) == 0, name
        print("ok quantize", capability)

    def planes(rows: int, length: int, rank: int) -> PlaneMatrix:
        num_experts, blocks = 128, length // 64
        low = torch.zeros(1, dtype=torch.int32).expand(num_experts, blocks, rows, 4)
        high = torch.zeros(1, dtype=torch.int16).expand(num_experts, blocks, rows, 4)
        lanes = torch.zeros(1, dtype=torch.int32).expand(32, num_experts * rank, 8)
        scales = torch.zeros(1).expand(32, num_experts * rank)
        factors = PlaneFactors(lanes, scales, lanes, scales, torch.zeros(num_experts + 1).int(), rank)
        return PlaneMatrix(low, high, torch.zeros(1, dtype=torch.int32), 3, 64, length, factors)

    if capability == 80:
        kernels.clear()
        x, pairs = torch.zeros(64, 2048, dtype=torch.float16), torch.zeros(40, 16).int()
        out, sums = torch.empty(512, 1536, dtype=torch.float16), torch.zeros(64, 32)
        backend._gemm(out, x, sums, pairs, pairs[:, 0], None, planes(1536, 2048, 16), 8)
        check_gemm("float16", kernels[0], capability)
    else:
        kernels.clear()
        w13, w2 = planes(1536, 2048, 32), planes(2048, 768, 32)
        x, weights, ids = torch.zeros(128, 2048).bfloat16(), torch.zeros(128, 8), torch.zeros(128, 8).int()
        backend.experts(x[:64], weights[:64], ids[:64], w13, None, w2, None)
        assert [kernel.metadata.name for kernel in kernels] == [
            *("align_kernel", "group_sums_kernel", "gemm_kernel", "silu_kernel", "gemm_kernel", "reduce_kernel")
        ]
        for number in (2, 4):
            check_gemm(number, kernels[number], capability)
        seen = list(kernels)
        kernels.clear()
        backend.experts(x, weights, ids, w13, None, w2, None)
        assert kernels == seen, "another number of tokens compiled another kernel"
    triton.JITFunction.run = run
    print("ok experts", capability)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "compile":
        for name in sys.argv[2:]:
            compile_all(int(name))
    else:
        for check in sys.argv[2:]:
            CHECKS[check]("cpu")
            print("ok", check)
