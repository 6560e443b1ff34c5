"""The KV cache's Triton kernels against their PyTorch specification: pages and rows bit for bit.

On CPU they run in Triton's interpreter, in subprocesses of this file, because `TRITON_INTERPRET` must be set before
Triton is imported and vLLM must not see it. On CUDA the compiled kernels run here. Without a GPU too, they are compiled
for sm_90 and the PTX is searched for what equality rests on.
"""

from __future__ import annotations

import collections
import math
import os
import re
import subprocess
import sys

import pytest
import torch

from rl_accel.kernels.kv_int4 import api, reference
from rl_accel.kernels.kv_int4.layout import PageLayout

STORES = [  # layout, order, dtype, with a shift
    (PageLayout(16, 16), 1, torch.float32, False),
    (PageLayout(16, 80), 16, torch.bfloat16, True),
    (PageLayout(32, 96, 8), 32, torch.float32, True),
    (PageLayout(64, 112), 2, torch.float16, False),
    (PageLayout(128, 128), 128, torch.bfloat16, False),
    (PageLayout(16, 32, 8), 8, torch.bfloat16, False),
]
BATCHES = [  # layout, order, query heads of a KV head, dtype, (seq_len, queries) of requests
    (PageLayout(16, 16), 1, 1, torch.float32, [(1, 1), (20, 20)]),
    (PageLayout(16, 80), 16, 3, torch.bfloat16, [(130, 5), (37, 1), (0, 0), (520, 1)]),
    (PageLayout(32, 96, 8), 32, 5, torch.float32, [(700, 7), (128, 3)]),
    (PageLayout(64, 112), 4, 7, torch.float16, [(513, 1), (512, 2)]),
    (PageLayout(128, 128), 128, 8, torch.bfloat16, [(1100, 1), (129, 1), (64, 1)]),
    (PageLayout(48, 64), 64, 20, torch.float32, [(100, 2)]),  # more heads than rows of the smallest tile
    (PageLayout(16, 32, 8), 8, 2, torch.float32, [(150, 150)]),
]

UNTOUCHED = -1024.0
"""In rows that nobody may write; no result is as large."""


def values(*shape: int, seed: int) -> torch.Tensor:
    """Normal values, and two dims of the last dimension that stand out."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., 3] *= 20.0
    x[..., 11] += 6.0
    return x


def garbage(num_blocks: int, num_heads: int, layout: PageLayout) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randint(0, 256, (num_blocks, num_heads, layout.page_bytes), generator=generator, dtype=torch.uint8)


def filled(layout: PageLayout, lengths: list[int], order: int, num_heads: int = 2):
    """Pages of random tokens between garbage, the requests' block table with garbage behind their blocks."""
    counts = [-(-length // layout.block_size) for length in lengths]
    num_blocks = sum(counts) + 1
    blocks = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(5)).int()
    table = torch.full((len(lengths), max(counts) + 2), 1 << 30, dtype=torch.int32)
    pages = garbage(num_blocks, num_heads, layout)
    for request, (own, length) in enumerate(zip(blocks[:-1].split(counts), lengths, strict=True)):
        table[request, : len(own)] = own
        if length:
            k, v = values(2, len(own) * layout.block_size, num_heads, layout.head_size, seed=request)
            for head in range(num_heads):
                for index, block in enumerate(own.tolist()):
                    tokens = slice(index * layout.block_size, (index + 1) * layout.block_size)
                    parts = [
                        reference.quantize(reference.rotate(x[tokens, head], n), layout.max_code)
                        for x, n in ((k, order), (v, 1))
                    ]
                    reference.write_page(pages[block, head], layout, *parts)
    return pages, table


def assert_same_rows(got: torch.Tensor, want: torch.Tensor, what: object = None) -> None:
    got, want = got.cpu().float(), want.float()
    same = (got.view(torch.int32) == want.view(torch.int32)) | (got.isnan() & want.isnan())
    assert same.all(), (what, int((~same).sum()), float((got - want).abs().nan_to_num().max()))


def stored(pages: torch.Tensor, layout: PageLayout, device: str, *args, order=16, shift=None) -> torch.Tensor:
    pages, args = pages.to(device, copy=True), [x.to(device) for x in args]
    shift = None if shift is None else shift.to(device)
    api.store(pages, layout, *args, order, shift, backend="triton" if device else "torch")
    return pages.cpu()


def check_store(device: str) -> None:
    """Words that several tokens of a call share, words half of which is there, negative slots, in shuffled order."""
    for number, (layout, order, dtype, with_shift) in enumerate(STORES):
        generator = torch.Generator().manual_seed(number)
        slots = torch.randperm(3 * layout.block_size, generator=generator)[:28]
        slots[:6] = layout.block_size + torch.tensor([6, 2, 5, 8, 3, 15])  # two words of V with 4 bits
        slots[6:] = slots[6:][~torch.isin(slots[6:], slots[:6])].repeat(2)[:22].unique().repeat(2)[:22]
        slots = torch.cat([slots[:6], slots[6:].unique(), torch.tensor([-1, -7])])
        slots = slots[torch.randperm(len(slots), generator=generator)]
        _, counts = (slots[slots >= 0] // layout.codes_per_word).unique(return_counts=True)
        assert counts.max() > 1 and counts.min() < layout.codes_per_word
        wide = values(len(slots), 4, layout.head_size, seed=number).to(dtype)
        k, v = wide[:, :2], wide[:, 2:]  # tokens at a stride, as in a fused projection
        shift = values(2, layout.head_size, seed=99) if with_shift else None
        before = garbage(3, 2, layout)
        want = before.clone()
        api.store(want, layout, slots, k, v, order, shift, backend="torch")
        got = stored(before, layout, device, slots, k, v, order=order, shift=shift)
        assert torch.equal(got, want), (layout, order, int((got != want).sum()))
        assert not torch.equal(want, before)


def check_store_of_extremes(device: str) -> None:
    layout = PageLayout(16, 32)
    x = values(12, 1, 32, seed=3)
    x[1], x[2], x[3], x[3, 0, 9] = 0.0, 3.0, -0.0, 0.0
    x[4, 0, 5], x[5, 0, 6], x[6, 0, 7] = math.nan, math.inf, -math.inf
    x[7, 0, 8] = 1e6  # beyond float16
    x[8] *= 1e-7  # a scale that is subnormal
    x[9] *= 1e-30  # one that is 0
    x[10] = 60000.0 + x[10]  # an offset coarser than the scale
    x[11] = torch.arange(32) / 2.0  # halves, which round to even
    for layout in (PageLayout(16, 32), PageLayout(16, 32, 8)):
        before = garbage(1, 1, layout)
        want = before.clone()
        for order in (1, 16):
            api.store(want, layout, torch.arange(12), x, x, order, backend="torch")
            got = stored(before, layout, device, torch.arange(12), x, x, order=order)
            assert torch.equal(got, want), (layout, order)


def attended(device: str, pages, layout, table, requests, query, scale, order, **options) -> torch.Tensor:
    from rl_accel.kernels.kv_int4 import triton as kernels

    starts = [0]
    for _, num_queries in requests:
        starts.append(starts[-1] + num_queries)
    start, lens = torch.tensor(starts).int().to(device), torch.tensor([n for n, _ in requests]).int().to(device)
    query = query.to(device)
    out = torch.full_like(query, UNTOUCHED)
    kernels.attend_batch(out, query, pages.to(device), layout, table.to(device), start, lens, scale, order, **options)
    return out.cpu()


def check_attend(device: str) -> None:
    for layout, order, groups, dtype, requests in BATCHES:
        lengths, counts = zip(*requests, strict=True)
        pages, table = filled(layout, list(lengths), order)
        query = values(sum(counts) + 2, 2 * groups, layout.head_size, seed=4).to(dtype)  # 2 rows of nobody
        # With the large one whole tiles weigh nothing beside others.
        scale = layout.head_size**-0.5 * (40.0 if groups == 5 else 1.0)
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        want = torch.full_like(query, UNTOUCHED)
        api.attend(query, pages, layout, table, starts, torch.tensor(lengths).int(), scale, order, out=want,
                   backend="torch")  # fmt: skip
        got = attended(device, pages, layout, table, requests, query, scale, order)
        assert_same_rows(got, want, (layout, order, groups))
        assert (got[-2:] == UNTOUCHED).all() and not (want[:-2] == UNTOUCHED).any()


def check_rows(device: str) -> None:
    """The same bits in a decoding step, a chunk of 5 and the whole prompt, with splits in programs or in the grid."""
    from rl_accel.kernels.kv_int4 import triton as kernels

    layout, length, heads = PageLayout(32, 32), 530, 3
    pages, table = filled(layout, [length], 16, 1)
    query = values(length, heads, 32, seed=6)

    def rows(end: int, count: int, **options) -> torch.Tensor:
        return attended(device, pages, layout, table, [(end, count)], query[end - count : end], 0.2, 16, **options)

    prompt = rows(length, length)
    enough = kernels.ENOUGH_PROGRAMS
    assert kernels.num_splits(1, 1, heads, 1, 32, length) == 2
    for end in (1, 512, 513, length):
        assert_same_rows(rows(end, 1), prompt[end - 1 : end], end)
        assert_same_rows(rows(end, 1, max_seq_len=4096), prompt[end - 1 : end], end)
    assert_same_rows(rows(515, 5), prompt[510:515])
    try:
        kernels.ENOUGH_PROGRAMS = 1
        assert kernels.num_splits(1, 1, heads, 1, 32, length) == 1
        assert_same_rows(rows(515, 5), prompt[510:515])
        many = attended(device, pages, layout, table.expand(3, -1).contiguous(), [(530, 1), (515, 5), (30, 2)],
                        torch.cat([query[529:], query[510:515], query[28:30]]), 0.2, 16)  # fmt: skip
        assert_same_rows(many, torch.cat([prompt[529:], prompt[510:515], prompt[28:30]]))
    finally:
        kernels.ENOUGH_PROGRAMS = enough
    assert prompt.isfinite().all() and prompt.std(0).min() > 0


def check_not_finite(device: str) -> None:
    layout = PageLayout(16, 16)
    for value in (math.nan, math.inf):
        for of_k in (True, False):
            pages, table = filled(layout, [40], 16)
            k, v = values(2, 1, 2, 16, seed=8)
            (k if of_k else v)[0, 1, 3] = value
            pages = stored(pages, layout, device, table[0, 1:2].long() * 16 + 4, k, v)
            query = values(40, 2, 16, seed=7)
            got = attended(device, pages, layout, table, [(40, 40)], query, 0.25, 16)
            assert got[:, 0].isfinite().all() and got[:20, 1].isfinite().all(), "other heads and earlier tokens"
            assert got[20:, 1].isnan().all()
            want = reference.attend(pages, layout, table[0, :3].tolist(), query, 40, 0.25, 16)
            assert_same_rows(got, want, (value, of_k))
    pages, table = filled(layout, [40], 16)
    query = torch.cat([torch.zeros(1, 2, 16), values(2, 2, 16, seed=7)])
    query[1, 0] *= 1e-36
    query[2, 1, 5] = value
    got = attended(device, pages, layout, table, [(40, 3)], query, 0.25, 16)
    assert got[:2].isfinite().all() and got[2, 0].isfinite().all() and got[2, 1].isnan().all()
    assert_same_rows(got, reference.attend(pages, layout, table[0, :3].tolist(), query, 40, 0.25, 16))


def check_arguments(device: str) -> None:
    """An order in memory, blocks at a stride, a workspace of NaN, one that is too small."""
    from rl_accel.kernels.kv_int4 import triton as kernels

    layout = PageLayout(16, 32)
    pages, table = filled(layout, [600], 8)
    query = values(2, 4, 32, seed=9)
    want = reference.attend(pages, layout, table[0, :38].tolist(), query, 600, 0.2, 8)
    needed = kernels.workspace_numel(2, 1, 4, 2, 32, 600)
    order = torch.tensor([8], dtype=torch.int32, device=device)
    workspace = torch.full((needed + 5,), math.nan, device=device)
    wide = torch.cat([pages, garbage(len(pages), 1, layout)], 1)
    padded = wide.to(device)[:, :2]  # blocks at a stride, as beside other layers
    got = attended(device, padded, layout, table, [(600, 2)], query, 0.2, order, max_seq_len=600, workspace=workspace)
    assert_same_rows(got, want)
    assert workspace[needed:].isnan().all() and not workspace[:needed].isnan().any()
    with pytest.raises(ValueError, match="workspace must have"):
        attended(device, pages, layout, table, [(600, 2)], query, 0.2, 8, max_seq_len=600, workspace=workspace[:9])
    k, v = values(2, 1, 2, 32, seed=10)
    slot = torch.tensor([37], device=device)
    by_value, by_pointer = pages.to(device, copy=True), wide.to(device, copy=True)[:, :2]
    assert by_value.stride(0) != by_pointer.stride(0)
    kernels.store(by_value, layout, slot, k.to(device), v.to(device), 8)
    kernels.store(by_pointer, layout, slot, k.to(device), v.to(device), order)
    assert torch.equal(by_value, by_pointer) and not torch.equal(by_value.cpu(), pages)


CHECKS = {
    "store": check_store,
    "extremes": check_store_of_extremes,
    "attend": check_attend,
    "rows": check_rows,
    "not finite": check_not_finite,
    "arguments": check_arguments,
}


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; the interpreter is tested below")
def test_on_cuda(name: str) -> None:
    CHECKS[name]("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_graph_follows_order_and_lengths() -> None:
    from rl_accel.kernels.kv_int4 import triton as kernels

    layout = PageLayout(16, 64)
    pages, table = filled(layout, [1500], 16)
    held, table = pages.to("cuda", copy=True), table.to("cuda")
    order = torch.tensor([16], dtype=torch.int32, device="cuda")
    slot, lens = torch.tensor([-1], device="cuda"), torch.tensor([1], dtype=torch.int32, device="cuda")
    start = torch.tensor([0, 1], dtype=torch.int32, device="cuda")
    k, v, query = values(3, 1, 8, 64, seed=2).to("cuda")
    out = torch.empty_like(query)

    def step() -> None:
        kernels.store(held, layout, slot, k[:, :2], v[:, :2], order)
        kernels.attend_batch(out, query, held, layout, table, start, lens, 0.125, order)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for length, new_order in ((1500, 16), (3, 64), (600, 1)):
        position = int(table[0, (length - 1) // 16]) * 16 + (length - 1) % 16
        slot.fill_(position), lens.fill_(length), order.fill_(new_order)
        want_pages = held.cpu()
        reference.store(want_pages, layout, torch.tensor([position]), k.cpu()[:, :2], v.cpu()[:, :2], new_order)
        blocks = table[0, : -(-length // 16)].tolist()
        want = reference.attend(want_pages, layout, blocks, query.cpu(), length, 0.125, new_order)
        graph.replay()
        assert torch.equal(held.cpu(), want_pages)
        assert_same_rows(out, want, (length, new_order))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pages_beyond_2_to_the_31_words() -> None:
    layout = PageLayout(128, 128)
    num_blocks = (1 << 33) // layout.page_bytes + 2
    if torch.cuda.mem_get_info()[0] < 1.1 * num_blocks * layout.page_bytes:
        pytest.skip("needs 9 GB")
    pages = torch.empty(num_blocks, 1, layout.page_bytes, dtype=torch.uint8, device="cuda")
    k, v = values(2, 1, 1, 128, seed=1)
    slot = (num_blocks - 1) * 128
    api.store(pages, layout, torch.tensor([slot], device="cuda"), k.cuda(), v.cuda())
    near = pages[-1:].cpu()
    api.store(near, layout, torch.tensor([0]), k, v, backend="torch")
    assert torch.equal(near, pages[-1:].cpu())
    got = attended("cuda", pages, layout, torch.tensor([[num_blocks - 1]]).int(), [(1, 1)], k, 0.1, 16)
    assert_same_rows(got, reference.attend(near, layout, [0], k, 1, 0.1, 16))


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
    return [line for line in done.stdout.splitlines() if line.startswith("ok ")]


@pytest.mark.parametrize("names", [["store", "extremes"], ["attend"], ["rows", "not finite", "arguments"]], ids=str)
def test_in_the_interpreter(names: list[str]) -> None:
    assert run_this_file("interpret", *names, TRITON_INTERPRET="1") == [f"ok {name}" for name in names]


def test_compiled_kernels_round_as_the_specification(tmp_path) -> None:
    """What launches compile for sm_90: products on tensor cores, additions that the assembler may not fuse, and one
    kernel for all orders and lengths."""
    assert run_this_file("compile", TRITON_CACHE_DIR=str(tmp_path)) == ["ok store", "ok attend", "ok merge"]


def check_ptx(name: str, bits: int, ptx: str) -> None:
    ops = collections.Counter(re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w.:]*)\s", ptx, re.MULTILINE))
    of = lambda word: {op for op in ops if re.search(word, op)}  # noqa: E731
    # floor flushes what is subnormal, which a sum with 0.5 never is
    assert of(r"^(fma|mad)\..*f(16|32)|ftz|approx|\.full\.") <= {"cvt.rmi.ftz.f32.f32"}, (name, ops)
    assert of(r"^(add|sub|mul|div|rcp)\..*f32$") <= {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32"}, (
        name,
        ops,
    )
    assert "div.rn.f32" in ops, (name, ops)
    products = of(r"^w?g?mma\.(sync|mma_async)")
    if name == "attend":
        assert any("s32.s8.s8" in op for op in products) and any("f32.f16.f16" in op for op in products), ops
    else:
        assert not products, (name, ops)
    assert bool(of(r"^(atom|red)\..*xor")) == (name == "store" and bits == 4), (name, ops)


def compile_all() -> None:
    """Compile for an H100 that is not there: the driver only says which target, and launches end after compiling."""
    import triton
    from triton.backends.compiler import GPUTarget

    from rl_accel.kernels.kv_int4 import triton as backend

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
    shapes = ((PageLayout(16, 128), 4, 32), (PageLayout(32, 80, 8), 3, 24), (PageLayout(16, 128), 600, 32))
    for layout, num_tokens, heads in shapes:
        seen = []
        for order, num_blocks in ((1, 64), (16, 65), (2, 66)):
            kernels.clear()
            pages = torch.zeros(1, 8, layout.page_bytes, dtype=torch.uint8)
            query = torch.zeros(num_tokens, heads, layout.head_size, dtype=torch.bfloat16)
            backend.store(pages, layout, torch.zeros(num_tokens).long(), query[:, :8], query[:, :8], order)
            backend.attend_batch(torch.empty_like(query), query, pages, layout, torch.zeros(2, num_blocks).int(),
                                 torch.zeros(3).int(), torch.zeros(2).int(), 0.1, order,
                                 max_seq_len=1024 * num_blocks)  # fmt: skip
            seen.append(list(kernels))
        for name, kernel in zip(("store", "attend", "merge"), seen[-1], strict=num_tokens < 600):
            check_ptx(name, layout.bits, kernel.asm["ptx"])
        assert seen[0] == seen[2], "a new order or length compiled a new kernel"
    for name in ("store", "attend", "merge"):
        print("ok", name)


def interpret(names: list[str]) -> None:
    from triton import language as tl
    from triton.runtime import interpreter

    # The interpreter cuts a float32 off to make a bfloat16; the GPU's instruction rounds.
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
