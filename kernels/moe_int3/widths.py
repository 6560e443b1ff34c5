"""Widths that the layout has (`layout.py`), for who must not import torch: settings, and checks before a run."""

from __future__ import annotations

from rl_accel.errors import MoEError

BLOCK = 64
"""Codes that are packed together."""
LANES = 8
BITS = (2, 3, 4)
GROUP_SIZES = (32, 64)
FACTOR_BITS, FACTOR_ZERO, MAX_FACTOR_CODE = 4, 8, 15


def num_blocks(length: int) -> int:
    """Return the blocks of a row of `length` codes."""
    return -(-length // BLOCK)


def check_width(bits: int, group_size: int, in_features: int) -> None:
    """Raise MoEError unless rows of `in_features` weights can be quantized so."""
    if bits not in BITS:
        raise MoEError(f"weights are quantized to {', '.join(map(str, BITS))} bits; got {bits}")
    if group_size not in GROUP_SIZES:
        raise MoEError(f"groups have {' or '.join(map(str, GROUP_SIZES))} weights; got {group_size}")
    if in_features % group_size:
        fitting = [size for size in GROUP_SIZES if in_features % size == 0]
        hint = f"a group size of {max(fitting)} would" if fitting else f"none of {GROUP_SIZES} would"
        raise MoEError(f"groups of {group_size} do not divide rows of {in_features} weights; {hint}")
