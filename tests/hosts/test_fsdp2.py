"""4-bit communication attached to FSDP2, on 1, 2 and 4 real gloo processes."""

from __future__ import annotations

from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fsdp2_ranks.py")


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_fsdp2(run_ranks, world_size):
    """Losses, routing, differences, loading, detach and refusals: see the script."""
    assert run_ranks(SCRIPT, world_size) == ["done"] * world_size
