"""Anonymous shared memory: a file without a name, handed to another process as a descriptor.

Nobody else can open it and nothing is left behind when both processes are gone, however they end. Linux.
"""

from __future__ import annotations

import mmap
import os

import numpy as np
import numpy.typing as npt

HEADER_BYTES = 256


class SharedBytes:
    """A block of shared memory: a header of int64 words, then whatever its owner lays out."""

    def __init__(self, num_bytes: int, name: str = "", descriptor: int | None = None):
        """Make a block, or map one that another process made.

        Raises:
            ValueError: if what is mapped is smaller than `num_bytes`.
        """
        size = HEADER_BYTES + num_bytes
        if descriptor is None:
            descriptor = os.memfd_create(name or "rl_accel", os.MFD_CLOEXEC)
            os.fchmod(descriptor, 0o600)
            os.ftruncate(descriptor, size)
        elif os.fstat(descriptor).st_size < size:
            raise ValueError(f"shared memory of {os.fstat(descriptor).st_size} bytes; {size} expected")
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, size)
        self.words: npt.NDArray[np.int64] = np.frombuffer(self._map, np.int64, HEADER_BYTES // 8)
        self.data: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8, num_bytes, HEADER_BYTES)

    def close(self) -> None:
        """Close the descriptor; the memory goes when nobody maps it any more."""
        os.close(self.descriptor)
