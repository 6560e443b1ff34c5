"""The KV cache's C++ against its specification, bit for bit: every instruction set that this CPU has, one thread and
several."""

from __future__ import annotations

import math
import random
import threading
from dataclasses import dataclass

import pytest
import torch

from rl_accel.errors import KVCacheError
from rl_accel.kernels.kv_int4 import api, cpp, reference
from rl_accel.kernels.kv_int4.layout import PageLayout

INSTRUCTIONS = ("scalar", "avx2", "avx512")
UNTOUCHED = 7.0
"""What `out` holds before a call."""


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
    """One thread, since the specification's would only wait for each other; afterwards the usual instructions."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    cpp.set_instructions("auto")


def aligned(num_blocks: int, num_heads: int, layout: PageLayout) -> torch.Tensor:
    """Pages at a multiple of 64 bytes, whose bytes are left as they are."""
    numel = num_blocks * num_heads * layout.page_bytes
    data = torch.empty(numel + 64, dtype=torch.uint8)
    return data[-data.data_ptr() % 64 :][:numel].view(num_blocks, num_heads, -1)


def assert_same(found: torch.Tensor, expected: torch.Tensor, what: object) -> None:
    """The same bits, of NaN only that it is one."""
    found, expected = found.float(), expected.float()
    both_nan = found.isnan() & expected.isnan()
    equal = (found.view(torch.int32) == expected.view(torch.int32)) | both_nan
    assert equal.all(), f"{what}: {int((~equal).sum())} of {equal.numel()} differ"


@dataclass
class Step:
    """Tokens to store and queries to answer."""

    layout: PageLayout
    num_heads: int
    pages: torch.Tensor
    slots: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    shift: torch.Tensor | None
    order: int
    query: torch.Tensor
    table: torch.Tensor
    start: torch.Tensor
    lens: torch.Tensor
    scale: float

    def run(self, backend) -> tuple[torch.Tensor, torch.Tensor]:
        """Return pages and output, a row longer than the queries."""
        pages = aligned(*self.pages.shape[:2], self.layout).copy_(self.pages)
        backend.store(pages, self.layout, self.slots, self.k, self.v, self.order, self.shift)
        out = torch.full((len(self.query) + 1, *self.query.shape[1:]), UNTOUCHED, dtype=self.query.dtype)
        backend.attend_batch(
            out, self.query, pages, self.layout, self.table, self.start, self.lens, self.scale, self.order
        )
        return pages, out

    def check(self) -> None:
        pages, out = self.run(reference)
        for name in supported():
            cpp.set_instructions(name)
            for num_threads in (1, 2, 5):
                torch.set_num_threads(num_threads)
                found_pages, found = self.run(cpp)
                torch.set_num_threads(1)
                assert torch.equal(found_pages, pages), (name, num_threads, self.layout)
                assert_same(found, out, (name, num_threads, self.layout))


def make(
    seed: int, layout: PageLayout, seq_lens: list[int], query_lens: list[int], groups: int, num_heads: int = 2,
    order: int = 16, dtype: torch.dtype = torch.float32,
) -> Step:  # fmt: skip
    """A step of random tokens in shuffled blocks and order, over pages of random bytes; strided inputs."""
    generator = torch.Generator().manual_seed(seed)
    most = max(math.ceil(n / layout.block_size) for n in seq_lens)
    num_blocks = len(seq_lens) * most + 1
    table = torch.randperm(num_blocks, generator=generator)[:-1].view(len(seq_lens), most).int()
    pages = torch.randint(
        0, 256, (num_blocks, num_heads, layout.page_bytes), generator=generator, dtype=torch.uint8
    )  # fmt: skip
    slots = torch.cat([
        table[i, torch.arange(n) // layout.block_size].long() * layout.block_size + torch.arange(n) % layout.block_size
        for i, n in enumerate(seq_lens)
    ])  # fmt: skip
    slots = slots[torch.randperm(len(slots), generator=generator)]
    d = layout.head_size
    kv = torch.randn(len(slots), 2 * num_heads, d, generator=generator).to(dtype)
    query = torch.randn(sum(query_lens), num_heads * groups + 1, d, generator=generator).to(dtype)
    return Step(
        layout, num_heads, pages, slots, kv[:, :num_heads], kv[:, num_heads:], None, order, query[:, 1:], table,
        torch.tensor([0, *query_lens]).cumsum(0).int(), torch.tensor(seq_lens).int(), d**-0.5,
    )  # fmt: skip


def any_step(seed: int) -> Step:
    rng = random.Random(seed)
    layout = PageLayout(rng.choice([16, 32, 48, 128]), rng.choice([16, 32, 64, 80, 96, 128]), rng.choice([4, 8]))
    order = rng.choice([n for n in (1, 2, 8, 16, 32, 64, 128) if layout.head_size % n == 0])
    seq_lens = [rng.choice([1, 16, 37, 129, 300, 520, 1100]) for _ in range(rng.choice([1, 2]))]
    query_lens = [min(n, rng.choice([0, 1, 1, 2, 5, 13])) for n in seq_lens]
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
    step = make(
        seed, layout, seq_lens, query_lens, rng.choice([1, 2, 3, 5, 8, 16]), rng.choice([1, 2, 3]), order, dtype
    )
    if rng.random() < 0.5:
        step.shift = torch.randn(step.num_heads, layout.head_size)
    if rng.random() < 0.4:
        step.pages.fill_(0xFF)
    token, odd = rng.randrange(len(step.k)), rng.choice([math.nan, math.inf, -math.inf, 1e6])
    match rng.randrange(8):
        case 0:
            step.k[token, 0, 3] = odd
        case 1:
            step.v[token, 0, 3] = odd
        case 2:
            step.k[:, :, rng.randrange(layout.head_size)] *= 300
        case 3:
            step.k[token], step.v[token] = 0.0, -0.0
        case 4:
            step.slots = torch.cat([step.slots, torch.tensor([-1])])
            step.k, step.v = (torch.cat([x, x[:1] + 1]) for x in (step.k, step.v))
        case 5:
            step.query[:1, :1, :1] = odd
    return step


@pytest.mark.parametrize("seed", range(24))
def test_random_steps(seed: int) -> None:
    any_step(seed).check()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_prompt_of_several_blocks_of_rows(bits: int) -> None:
    make(1, PageLayout(32, 16, bits), [150], [150], 3, 1).check()


@pytest.mark.parametrize("bits", [4, 8])
def test_splits_of_a_long_request_are_merged_in_order(bits: int) -> None:
    """With threads and few items, parts of splits are computed apart."""
    make(2, PageLayout(48, 32, bits), [2700, 30], [1, 1], 2, 1).check()


@pytest.mark.parametrize(("head_size", "order"), [(256, 256), (512, 512), (48, 16)])
def test_head_sizes_and_orders(head_size: int, order: int) -> None:
    make(3, PageLayout(16, head_size), [40], [2], 1, 2, order).check()


@pytest.mark.parametrize("bits", [4, 8])
def test_sums_of_the_largest_codes_and_queries_fit(bits: int) -> None:
    layout = PageLayout(128, 512, bits)
    step = make(4, layout, [128], [1], 1, 1, 1)
    step.slots.fill_(-1)
    step.pages.fill_(0xFF)
    ones = torch.ones(128).half()
    halves = step.pages.view(2, 2, layout.half_bytes)[..., layout.code_bytes :].view(torch.float16)
    halves.copy_(torch.cat([ones * 0.01, ones]).expand_as(halves))
    for sign in (1.0, -1.0):
        step.query.fill_(sign)
        step.check()


def test_a_tile_far_below_the_largest_score() -> None:
    """Weights about 1e-36, whose reciprocal times 32767 is beyond float32."""
    step = make(5, PageLayout(128, 16), [256], [1], 1, 1, 1)
    step.query.fill_(1.0)
    step.k.fill_(0.0)
    step.k[step.slots == step.table[0, 0] * 128] = 81.0 / 16
    step.scale = 1.0
    _, out = step.run(reference)
    assert out[0].isfinite().all() and out[0].abs().max() < 10
    step.check()
    step.query.fill_(1e-38)
    step.check()


def test_queries_and_values_of_zero() -> None:
    step = make(6, PageLayout(16, 16), [20], [3], 2)
    step.query.fill_(0.0)
    step.v.fill_(0.0)
    step.check()


def test_of_equal_slots_the_last_wins() -> None:
    layout = PageLayout(16, 32)
    step = make(7, layout, [64], [1], 1)
    step.slots = step.slots[:8].repeat(8)
    step.check()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_a_row_is_the_same_in_a_prompt_a_draft_and_alone(name: str, bits: int) -> None:
    if name not in supported():
        pytest.skip(f"this CPU has no {name}")
    cpp.set_instructions(name)
    layout = PageLayout(32, 64, bits)
    step = make(8, layout, [700], [700], 4, 2, 16, torch.bfloat16)
    pages, whole = step.run(cpp)
    for first, last in ((0, 1), (3, 8), (127, 129), (511, 514), (695, 700), (699, 700), (100, 700)):
        out = torch.empty_like(whole[first:last])
        cpp.attend_batch(
            out, step.query[first:last], pages, layout, step.table, torch.tensor([0, last - first]).int(),
            torch.tensor([last]).int(), step.scale, 16,
        )  # fmt: skip
        assert torch.equal(out, whole[first:last])


def test_calls_from_several_python_threads() -> None:
    steps = [make(seed, PageLayout(32, 64), [600], [4], 4) for seed in (10, 11, 12)]
    expected = [step.run(cpp)[1] for step in steps]
    torch.set_num_threads(2)
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(20) if not torch.equal(steps[i].run(cpp)[1], expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(steps))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_interface_takes_this_backend_on_a_cpu() -> None:
    step = make(13, PageLayout(16, 32), [40], [2], 2)
    pages, expected = step.run(cpp)
    assert api.load_backend("auto") is cpp
    found = api.attend(step.query, pages, step.layout, step.table, step.start, step.lens, step.scale, 16)
    assert torch.equal(found, expected[:-1])


def test_what_it_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="no instruction set sse9"):
        cpp.set_instructions("sse9")
    assert cpp.instructions() in INSTRUCTIONS
    layout = PageLayout(16, 528)
    pages = aligned(1, 1, layout)
    k = torch.zeros(1, 1, 528)
    with pytest.raises(KVCacheError, match="head sizes up to 512"):
        api.store(pages, layout, torch.tensor([0]), k, k, 16, backend="cpp")
