"""The fingerprint that compares replicas: whatever differs is found."""

from __future__ import annotations

import pytest
import torch

from rl_accel.comm.fingerprint import fingerprint

SIZES = (1, 3, 1000, (1 << 16) * 2 + 5)
"""The last has more words than there are lanes, in float32 and in bfloat16."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8])
@pytest.mark.parametrize("numel", SIZES)
def test_every_bit_of_every_value_counts(dtype, numel):
    generator = torch.Generator().manual_seed(numel)
    x = torch.randint(-100, 100, (numel,), generator=generator).to(dtype)
    expected = fingerprint([x])
    assert fingerprint([x.clone()]) == expected
    for _ in range(20):
        changed = x.clone()
        raw = changed.view(torch.uint8)
        place = int(torch.randint(0, raw.numel(), (1,), generator=generator))
        raw[place] ^= 1 << int(torch.randint(0, 8, (1,), generator=generator))
        assert fingerprint([changed]) != expected, place


def test_order_signs_and_sizes_count():
    x = torch.arange(300_000, dtype=torch.float32)
    seen = {
        fingerprint([x]),
        fingerprint([x.flip(0)]),
        fingerprint([-x]),
        fingerprint([x.roll(1)]),
        fingerprint([x.roll(1 << 16)]),  # by whole lanes
        fingerprint([x[:150_000], x[150_000:]]),
        fingerprint([x[150_000:], x[:150_000]]),
        fingerprint([x[:-1]]),
        fingerprint([torch.cat([x, torch.zeros(1)])]),
        fingerprint([]),
        fingerprint([torch.zeros(4)]),
        fingerprint([torch.zeros(8)]),
    }
    assert len(seen) == 12


def test_layout_and_alignment_do_not_count():
    x = torch.randn(1001, generator=torch.Generator().manual_seed(0)).bfloat16()
    padded = torch.cat([torch.zeros(1, dtype=torch.bfloat16), x])
    assert fingerprint([padded[1:]]) == fingerprint([x])
    grid = x[:1000].view(10, 100)
    assert fingerprint([grid.t().contiguous().t()]) == fingerprint([grid])


def test_many_differences_at_once_are_found():
    """4,000 random tensors, 8 million pairs: 20 good bits would show 8 collisions, 32 one in 500 runs."""
    generator = torch.Generator().manual_seed(1)
    seen = {fingerprint([torch.randn(64, generator=generator)]) for _ in range(4000)}
    assert len(seen) == 4000
