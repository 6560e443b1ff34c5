"""Layout of a quantized block: what every backend of the codec agrees on.

A block of N values is padded with zeros to whole groups and sent as one run of bytes:
    codes   N * bits / 8 bytes. 8 bits: int8, in order. 4 bits: byte j of each 32 values holds value j in its low and
            value j + 16 in its high nibble, two's complement.
    scales  one little-endian float32 per group
"""

from __future__ import annotations

from rl_accel.errors import CommError

BITS = (4, 8)
HADAMARD_BLOCK = 32
MIN_GROUP, MAX_GROUP = 32, 32768
TINY = 2.0**-100
"""A group whose largest magnitude is below this is sent as zeros; the reciprocal of its scale stays finite."""


def max_code(bits: int) -> int:
    """Largest code, 7 or 127; the range is symmetric."""
    return (1 << (bits - 1)) - 1


def padded(numel: int, group_size: int) -> int:
    """Values in the whole groups that hold `numel` values."""
    return -(-numel // group_size) * group_size


def packed_bytes(numel: int, bits: int, group_size: int) -> int:
    """Bytes of a block of `numel` values: codes and scales."""
    values = padded(numel, group_size)
    return values * bits // 8 + values // group_size * 4


def check_format(bits: int, group_size: int) -> None:
    """Raise CommError for bits other than 4 and 8 and for groups other than a power of two from 32 to 32,768."""
    if bits not in BITS:
        raise CommError(f"codes have 4 or 8 bits; got {bits}")
    if not MIN_GROUP <= group_size <= MAX_GROUP or group_size & (group_size - 1):
        raise CommError(f"group_size must be a power of two from {MIN_GROUP} to {MAX_GROUP}; got {group_size}")
