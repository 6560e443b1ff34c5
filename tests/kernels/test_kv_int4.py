"""The specification of the quantized KV cache against attention in float64, and what it promises of bits."""

from __future__ import annotations

import math

import pytest
import torch

from rl_accel.errors import KVCacheError
from rl_accel.kernels.kv_int4 import api, reference
from rl_accel.kernels.kv_int4.layout import PageLayout

LAYOUTS = [PageLayout(16, 16), PageLayout(32, 64), PageLayout(16, 80, 8), PageLayout(128, 32, 8)]


def filled(layout: PageLayout, num_tokens: int, num_kv_heads: int = 2, order: int = 16, seed: int = 0):
    """Pages of random tokens in shuffled blocks, poisoned where nothing was written; blocks, K and V."""
    generator = torch.Generator().manual_seed(seed)
    num_blocks = math.ceil(num_tokens / layout.block_size)
    blocks = torch.randperm(num_blocks + 2, generator=generator)[:num_blocks].tolist()
    pages = torch.full((num_blocks + 2, num_kv_heads, layout.page_bytes), 0xFF, dtype=torch.uint8)
    k, v = torch.randn(2, num_tokens, num_kv_heads, layout.head_size, generator=generator)
    slots = torch.tensor([blocks[i // layout.block_size] * layout.block_size + i % layout.block_size
                          for i in range(num_tokens)])  # fmt: skip
    reference.store(pages, layout, slots, k, v, order)
    return pages, blocks, k, v


def naive(query, k, v, scale: float) -> torch.Tensor:
    """Causal attention of the last tokens, float64."""
    num_rows, num_heads, _ = query.shape
    groups = num_heads // k.shape[1]
    out = torch.zeros(query.shape, dtype=torch.float64)
    for row in range(num_rows):
        visible = len(k) - num_rows + row + 1
        for head in range(num_heads):
            scores = (k[:visible, head // groups].double() @ query[row, head].double()) * scale
            out[row, head] = scores.softmax(0) @ v[:visible, head // groups].double()
    return out


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_pages_hold_what_was_quantized(layout: PageLayout) -> None:
    assert layout.token_bytes == 2 * layout.head_size * layout.bits // 8 + 8
    generator = torch.Generator().manual_seed(1)
    page = torch.randint(0, 256, (layout.page_bytes,), generator=generator, dtype=torch.uint8)
    parts = [reference.quantize(torch.randn(layout.block_size, layout.head_size, generator=generator), layout.max_code)
             for _ in range(2)]  # fmt: skip
    reference.write_page(page, layout, *parts)
    for read, wrote in zip(reference.read_page(page, layout), parts, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(read, wrote, strict=True))


def test_words_lie_as_the_layout_says() -> None:
    """Dim 9 of token 17 of K, and dim 17 of token 9 of V, by hand."""
    layout = PageLayout(32, 32)
    k, v = [(torch.zeros(32, 32, dtype=torch.uint8), torch.zeros(32).half(), torch.zeros(32).half()) for _ in range(2)]
    k[0][17, 9], v[0][9, 17] = 5, 6
    page = torch.zeros(layout.page_bytes, dtype=torch.uint8)
    reference.write_page(page, layout, k, v)
    words = page.view(torch.int32)
    k_word = (1 * (32 // 8) + 1) * 16 + 1  # second group of tokens, second word of dims, lane 1
    v_word = layout.half_bytes // 4 + (1 * (32 // 8) + 1) * 16 + 1
    assert words[k_word] == 5 << 4 and words[v_word] == 6 << 4
    assert words.count_nonzero() == 2


@pytest.mark.parametrize("max_code", [15, 255])
def test_values_are_read_within_half_a_step(max_code: int) -> None:
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(2)) * torch.logspace(-3, 3, 200)[:, None]
    codes, scale, offset = reference.quantize(x, max_code)
    read = codes.float() * scale.float()[:, None] + offset.float()[:, None]
    step = (x.amax(-1) - x.amin(-1)) / max_code
    rounding = 2.0**-11 * (x.abs().amax(-1) + max_code * step) + 2.0**-24 * max_code
    assert ((read - x).abs().amax(-1) <= 0.5 * step + rounding).all()


@pytest.mark.parametrize("x", [torch.zeros(16), torch.full((16,), 3.0), torch.full((16,), -1e-9)])
def test_a_constant_vector_is_exact_in_float16(x: torch.Tensor) -> None:
    codes, scale, offset = reference.quantize(x, 15)
    assert not codes.any() and scale == 0 and offset == x[0].half()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 37, 300, 1100])
def test_attention_is_that_of_the_values_read(layout: PageLayout, num_tokens: int) -> None:
    """Against float64 over dequantized pages: only the rounding of query, weights and sums is left."""
    pages, blocks, _, _ = filled(layout, num_tokens)
    num_rows = min(3, num_tokens)
    query = torch.randn(num_rows, 4, layout.head_size, generator=torch.Generator().manual_seed(3))
    scale = layout.head_size**-0.5
    found = reference.attend(pages, layout, blocks, query, num_tokens, scale, 16)
    parts = [[reference.read_page(pages[b, h], layout) for b in blocks] for h in range(2)]
    k, v = [torch.stack([torch.cat([p[half][0] * p[half][1].float()[:, None] + p[half][2].float()[:, None]
                                    for p in parts[h]])[:num_tokens] for h in range(2)], 1)
            for half in range(2)]  # fmt: skip
    exact = naive(reference.rotate(query, 16), k, v, scale)
    assert (found.double() - exact).abs().max() <= 1e-3 * exact.abs().max()


@pytest.mark.parametrize(("bits", "limit"), [(4, 0.15), (8, 0.01)])
def test_attention_is_near_that_of_the_values_given(bits: int, limit: float) -> None:
    layout = PageLayout(32, 64, bits)
    pages, blocks, k, v = filled(layout, 200)
    query = torch.randn(4, 4, 64, generator=torch.Generator().manual_seed(4))
    found = reference.attend(pages, layout, blocks, query, 200, 0.125, 16)
    exact = naive(query, k, v, 0.125)
    assert ((found - exact).norm() / exact.norm()) < limit


def test_rotation_helps_where_a_dim_stands_out() -> None:
    layout = PageLayout(32, 64)
    generator = torch.Generator().manual_seed(5)
    k, v = torch.randn(2, 64, 1, 64, generator=generator)
    k[..., 7] *= 30.0
    query = torch.randn(1, 1, 64, generator=generator)
    query[..., 7] /= 30.0
    errors = {}
    for order in (1, 16):
        pages = torch.zeros(2, 1, layout.page_bytes, dtype=torch.uint8)
        reference.store(pages, layout, torch.arange(64), k, v, order)
        found = reference.attend(pages, layout, [0, 1], query, 64, 0.125, order)
        errors[order] = float((found - naive(query, k, v, 0.125)).norm())
    assert errors[16] < 0.7 * errors[1]


def test_a_shift_of_k_changes_nothing_but_its_rounding() -> None:
    layout = PageLayout(32, 64)
    generator = torch.Generator().manual_seed(8)
    k, v = torch.randn(2, 96, 2, 64, generator=generator)
    shift = 8.0 * torch.randn(2, 64, generator=generator)
    query = torch.randn(2, 4, 64, generator=generator)
    exact = naive(query, k + shift, v, 0.125)
    errors = []
    for used in (None, shift):
        pages = torch.zeros(3, 2, layout.page_bytes, dtype=torch.uint8)
        reference.store(pages, layout, torch.arange(96), k + shift, v, 16, used)
        found = reference.attend(pages, layout, [0, 1, 2], query, 96, 0.125, 16)
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[1] < 0.12 < errors[0]


def test_a_row_depends_on_nothing_but_what_it_sees() -> None:
    """The same bits alone or with other rows, as a draft or a decoding step, in other blocks, beside poison."""
    layout = PageLayout(16, 32)
    pages, blocks, k, v = filled(layout, 200)
    query = torch.randn(5, 4, 32, generator=torch.Generator().manual_seed(6))
    together = reference.attend(pages, layout, blocks, query, 200, 0.17, 16)
    for row in range(5):
        alone = reference.attend(pages, layout, blocks, query[row : row + 1], 196 + row, 0.17, 16)
        assert torch.equal(alone[0], together[row])
    elsewhere, others, _, _ = filled(layout, 200, seed=9)
    assert others != blocks
    slots = torch.tensor([others[i // 16] * 16 + i % 16 for i in range(200)])
    for start, end in ((0, 3), (3, 150), (150, 200)):  # stored in chunks
        reference.store(elsewhere, layout, slots[start:end], k[start:end], v[start:end], 16)
    assert torch.equal(reference.attend(elsewhere, layout, others, query, 200, 0.17, 16), together)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6])
@pytest.mark.parametrize("of_k", [True, False])
def test_what_is_not_finite_shows_where_it_is_seen(value: float, of_k: bool) -> None:
    layout = PageLayout(16, 16)
    pages, blocks, k, v = filled(layout, 40)
    (k if of_k else v)[20, 1, 3] = value
    slot = torch.tensor([blocks[1] * 16 + 4])
    reference.store(pages, layout, slot, k[20:21], v[20:21], 16)
    query = torch.randn(40, 2, 16, generator=torch.Generator().manual_seed(7))
    found = reference.attend(pages, layout, blocks, query, 40, 0.25, 16)
    assert found[:, 0].isfinite().all() and found[:20, 1].isfinite().all(), "other heads and earlier tokens"
    assert found[20:, 1].isnan().all()


def test_negative_slots_are_left_out_and_shapes_are_checked() -> None:
    layout = PageLayout(16, 16)
    pages, _, k, v = filled(layout, 16)
    before = pages.clone()
    reference.store(pages, layout, torch.tensor([-1]), k[:1] + 1, v[:1] + 1, 16)
    assert torch.equal(pages, before)
    for block, head, bits in ((8, 16, 4), (16, 24, 4), (16, 16, 3)):
        with pytest.raises(ValueError, match=r"must be a multiple of 16|4 or 8 bits"):
            PageLayout(block, head, bits)


def test_what_does_not_fit_is_refused() -> None:
    layout = PageLayout(16, 32)
    pages = torch.zeros(4, 2, layout.page_bytes, dtype=torch.uint8)
    k = torch.randn(3, 2, 32)
    slots, table = torch.arange(3), torch.zeros(1, 1, dtype=torch.int32)
    start, lens = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)

    def store(pages=pages, slots=slots, k=k, v=k, order=16, shift=None):
        return lambda: api.store(pages, layout, slots, k, v, order, shift)

    def attend(query=k, table=table, start=start, lens=lens, order=16, **more):
        return lambda: api.attend(query, pages, layout, table, start, lens, 0.2, order, **more)

    for call, words in (
        (store(pages=pages[:, :, 1:]), "pages must be uint8"),
        (store(pages=pages[::2]), "must be contiguous"),
        (store(slots=slots.int()), "slots must be"),
        (store(k=k[:2]), "k must be"),
        (store(k=k.double()), "k must be"),
        (store(v=k.bfloat16()), "one dtype"),
        (store(k=k.transpose(1, 2).contiguous().transpose(1, 2)), "must be contiguous"),
        (store(order=24), "power of two"),
        (store(order=64), "power of two"),
        (store(shift=torch.zeros(2, 16)), "shift must be"),
        (attend(query=torch.randn(3, 3, 32)), "a multiple of 2 KV heads"),
        (attend(table=table.long()), "block_table must be"),
        (attend(lens=lens[:0]), "are of 1, 0 and 1 requests"),
        (attend(out=torch.zeros(3, 2, 32).half()), "as the queries"),
        (attend(backend="cuda"), "is unknown"),
    ):
        with pytest.raises(KVCacheError, match=words):
            call()
