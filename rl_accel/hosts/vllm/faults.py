"""What went wrong in an engine and was contained: counted since the start, and each kind logged once.

A request may carry anything, and a feature may fail; neither may end an engine that serves others. So the code that
runs inside the engine's step keeps a fault to the request that caused it and says so here. The counts reach verl's
metrics through the worker extension.
"""

from __future__ import annotations

import logging
from collections import Counter

logger = logging.getLogger(__name__)

MALFORMED = "malformed_identities"
"""Requests whose `extra_args["rl_accel"]` cannot be read; they are served as anonymous ones."""


class Faults:
    """Counters of one engine, by kind."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def note(self, kind: str, message: str, *arguments: object, error: BaseException | None = None) -> None:
        """Count a fault; log the first of its kind, with the traceback of `error`."""
        self.counts[kind] += 1
        if self.counts[kind] == 1:
            level = logging.WARNING if error is None else logging.ERROR
            logger.log(level, f"rl_accel: {message} (logged once; counted as {kind})", *arguments, exc_info=error)
