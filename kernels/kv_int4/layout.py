"""Layout of a quantized KV-cache page: what every backend agrees on.

A page holds K and V of `block_size` tokens of one KV head; d = head_size. A token takes d + 8 bytes with 4 bits,
2 d + 8 with 8:

    K codes    [block_size / 16][d / D][16 tokens]   words of D dims of one token
    K scales   [block_size] float16 | K offsets [block_size] float16
    V codes    [d / 16][block_size / D][16 dims]     words of D tokens of one dim
    V scales   [block_size] float16 | V offsets [block_size] float16

A word has 32 bits, so D is 8 with 4 bits and 4 with 8; code i of a word is at bit i * `bits`; words are little-endian.
The lanes of a vector are 16 tokens of K and 16 dims of V: no sum runs across lanes. A value is code * scale + offset,
per token and head, K and V each by themselves.

Source: ours; the bytes are those of vLLM's `int4_per_token_head`, whose zero point is an integer.
"""

from __future__ import annotations

from dataclasses import dataclass

LANES = 16
BITS = (4, 8)
WORD_BITS = 32


@dataclass(frozen=True)
class PageLayout:
    """Where things lie in a page."""

    block_size: int
    """Tokens."""
    head_size: int
    bits: int = 4
    """Of a code."""

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"codes have 4 or 8 bits; got {self.bits}")
        for name in ("block_size", "head_size"):
            value = getattr(self, name)
            if value < LANES or value % LANES:
                raise ValueError(f"{name} must be a multiple of {LANES}; got {value}")

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def codes_per_word(self) -> int:
        return WORD_BITS // self.bits

    @property
    def code_bytes(self) -> int:
        """Of the codes of K, or of V."""
        return self.block_size * self.head_size * self.bits // 8

    @property
    def half_bytes(self) -> int:
        """Of K, or of V: codes, scales and offsets."""
        return self.code_bytes + 4 * self.block_size

    @property
    def page_bytes(self) -> int:
        return 2 * self.half_bytes

    @property
    def token_bytes(self) -> int:
        """Of a token of one head."""
        return self.page_bytes // self.block_size
