"""Lines of JSON over a pipe, read without waiting for more than is there."""

from __future__ import annotations

import json
import os
import select
import time
from typing import Any


class LineReader:
    """Reads messages from a descriptor."""

    def __init__(self, descriptor: int):
        self._descriptor, self._rest = descriptor, b""
        self.ended = False
        """Whether the other end is gone."""

    def next(self, timeout_s: float = 0.0) -> dict[str, Any] | None:
        """Return a message, or None if none has come in time."""
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            if not select.select([self._descriptor], [], [], max(deadline - time.monotonic(), 0.0))[0]:
                return None
            read = os.read(self._descriptor, 1 << 16)
            if not read:
                self.ended = True
                return None
            self._rest += read
        line, self._rest = self._rest.split(b"\n", 1)
        return json.loads(line)
