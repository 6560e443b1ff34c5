"""A time limit for calls into other processes that may never answer."""

from __future__ import annotations

import threading
from collections.abc import Callable

from rl_accel.errors import WeightSyncError


def call_within(call: Callable[[], None], timeout_s: float, what: str) -> None:
    """Run ``call`` in a thread and wait for it at most ``timeout_s`` seconds.

    A call that does not return keeps its daemon thread; the caller is expected to end the process.

    Raises:
        WeightSyncError: if the call does not return in time, or raises; the cause is chained.
    """
    done = threading.Event()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            failures.append(error)
        finally:
            done.set()

    threading.Thread(target=run, name="rl_accel_watchdog", daemon=True).start()
    if not done.wait(timeout_s):
        raise WeightSyncError(
            f"{what} did not finish within {timeout_s:g} s (rl_accel.sync.timeout_s); a receiver that died leaves its "
            "sender waiting for ever"
        )
    if failures:
        raise WeightSyncError(f"{what} failed: {failures[0]}") from failures[0]
