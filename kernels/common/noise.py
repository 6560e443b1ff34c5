"""Counter-based random numbers in PyTorch: the specification of what the C++ and Triton kernels draw.

A number is a pure function of a key and an index, so it does not depend on how work is split or ordered. Two kinds:
64 bits by SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), where one stream per key is sampled from, and 32 bits by a
mixing function with the multipliers of `lowbias32` (Wellons, 2018), where rounding needs noise for every value.
Left out: any state. Cost: some integer operations a number.
"""

from __future__ import annotations

import torch

GAMMA = 0x9E3779B97F4A7C15
"""Increment of a SplitMix64 stream."""
_MIX64 = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK64 = (1 << 64) - 1
_MASK32 = 0xFFFFFFFF


def signed(value: int) -> int:
    """The int64 of the same 64 bits, as tensors hold them."""
    return value - (1 << 64) if value >> 63 else value


def mix64_(x: torch.Tensor) -> torch.Tensor:
    """Apply the SplitMix64 output function in place to int64 values taken as 64 bits."""
    x ^= (x >> 30) & ((1 << 34) - 1)
    x *= signed(_MIX64[0])
    x ^= (x >> 27) & ((1 << 37) - 1)
    x *= signed(_MIX64[1])
    x ^= (x >> 31) & ((1 << 33) - 1)
    return x


def fold_key(*words: int) -> int:
    """Return the 64-bit key of a stream of noise: every word (seed, step, hop, rank, ...) is mixed in by a round of
    SplitMix64."""
    key = 0
    for word in words:
        key = (key + (word & _MASK64) * 0xD1342543DE82EF95 + GAMMA) & _MASK64
        key = ((key ^ (key >> 30)) * _MIX64[0]) & _MASK64
        key = ((key ^ (key >> 27)) * _MIX64[1]) & _MASK64
        key ^= key >> 31
    return key


def mix32(word: torch.Tensor) -> torch.Tensor:
    """Mix the lowest 32 bits of int64 values."""
    word = word & _MASK32
    word = ((word ^ (word >> 16)) * 0x7FEB352D) & _MASK32
    word = ((word ^ (word >> 15)) * 0x846CA68B) & _MASK32
    return word ^ (word >> 16)


def rounding_noise(key: int, index: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Noise for stochastic rounding, float32 [count], uniform over the 2^24 multiples of 2^-24 in [-0.5, 0.5): a
    function of the key and of index + i, 64 bits each."""
    indices = torch.arange(index, index + count, dtype=torch.int64, device=device)
    high = mix32((indices >> 32) ^ (key >> 32))
    word = ((indices & _MASK32) * 0x9E3779B9 + (key & _MASK32)) & _MASK32
    word = ((word ^ (word >> 16)) * 0x7FEB352D) & _MASK32
    word = word ^ high
    word = ((word ^ (word >> 15)) * 0x846CA68B) & _MASK32
    word = word ^ (word >> 16)
    return (word >> 8).float() * 2.0**-24 - 0.5
