"""An event loop whose time is simulated: nothing waits, so the shipped core runs at the speed of the processor.

Differs from a simulator of its own in that there is none: what is measured on the virtual clock is `core.py` itself.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _NoWaiting(selectors.SelectSelector):
    """Never waits: what it should have waited is added to the time."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list:
        if timeout is None:
            raise RuntimeError("nothing is going to happen: every task waits for another")
        self.now += max(timeout, 0.0)
        return []


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """Time begins at 0 and passes only where every task sleeps. Real input and output are not served."""

    def __init__(self) -> None:
        self._clock = _NoWaiting()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


def run(main: Coroutine[Any, Any, T]) -> tuple[T, float]:
    """Return the result of a coroutine and the simulated seconds that it took.

    Raises:
        RuntimeError: if every task waits for another one.
    """
    loop = VirtualClockLoop()
    try:
        return loop.run_until_complete(main), loop.time()
    finally:
        loop.close()
