"""What the engine and the process that drafts ahead say to each other: a header and token ids, a packet each.

The socket keeps packets whole (`SOCK_SEQPACKET`), so that there is nothing to parse and no lock; its end is the end of
the other process.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from enum import IntEnum

import numpy as np

HEADER = struct.Struct("<IIIifqfif")
MAX_TOKENS = 1 << 15
"""Of a packet; the kernel's default buffer takes 2^17 bytes."""
MAX_BYTES = HEADER.size + 4 * MAX_TOKENS


class Kind(IntEnum):
    """What a packet says."""

    READY = 0
    """The model is there; `position`: its vocabulary."""
    BEGIN = 1
    """A text with its first tokens; `position`: no token behind this many, `sampling`."""
    VERIFIED = 2
    """Tokens that the policy has written; `position`: of the first of them, `count`: number of this packet, from 1."""
    TOKENS = 3
    """Drafted tokens; `position`: of the first, `count`: `VERIFIED` packets read before, `seconds`: a token's."""
    END = 4
    """The text is of no interest any more."""


@dataclass(frozen=True)
class Sampling:
    """How a text is sampled."""

    key: int = 0
    """Of its noise, `sampling/keys.py`."""
    temperature: float = 0.0
    """0: the likeliest token."""
    top_k: int = 0
    """0: all."""
    top_p: float = 1.0


@dataclass(frozen=True)
class Packet:
    """A packet; what its kind does not name is 0."""

    kind: Kind
    text: int = 0
    """Number of the text, given by the engine."""
    count: int = 0
    position: int = 0
    seconds: float = 0.0
    sampling: Sampling = Sampling()
    tokens: Sequence[int] = ()

    def pack(self) -> bytes:
        head = HEADER.pack(self.kind, self.text, self.count, self.position, self.seconds, *astuple(self.sampling))
        return head + np.asarray(self.tokens, np.int32).tobytes()

    @classmethod
    def unpack(cls, data: bytes) -> Packet:
        kind, text, count, position, seconds, *sampling = HEADER.unpack_from(data)
        return cls(
            Kind(kind),
            text,
            count,
            position,
            seconds,
            Sampling(*sampling),
            tokens=np.frombuffer(data, np.int32, offset=HEADER.size).tolist(),
        )
