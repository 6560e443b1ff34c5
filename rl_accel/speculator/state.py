"""What a server keeps over restarts: head, optimizer and version in a file that is whole or not there.

The trainer opens it before it learns, writes it every `SAVE_S` while it learned, and when it ends. A file that is
damaged, or of a head of another shape, is put aside under another name, and the head learns anew. Under verl there is
no such file: the checkpoint is the source (`hosts/trainer.py`).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

SAVE_S = 60.0

Order = Callable[[dict[str, Any]], dict[str, Any]]


def state_file(folder: str, rank: int = 0) -> str:
    """Return the file of an engine, "" without a folder: named as in verl's checkpoints, one a data-parallel rank."""
    return os.path.abspath(os.path.join(folder, f"engine{rank:03d}.pt")) if folder else ""


class StateFile:
    """Nothing in here is worth the trainer's end: what fails is logged."""

    def __init__(self, path: str, save: Order, restore: Order):
        """Args:
        path: the file; "" keeps nothing.
        save, restore: orders of the trainer, with a path.
        """
        self.path, self._save, self._restore = path, save, restore
        self._saved: object = None
        self._saved_at, self._failed = time.monotonic(), False

    def restore(self, progress: Callable[[], object]) -> None:
        """Go on with the file where it is there.

        Args:
            progress: what tells one state from the next.
        """
        if self.path and os.path.exists(self.path):
            try:
                self._restore({"path": self.path})
            except Exception as error:  # whatever a damaged file makes of itself
                aside = f"{self.path}.refused-{time.strftime('%Y%m%d-%H%M%S')}"
                os.replace(self.path, aside)
                logger.warning(
                    "rl_accel: the head of the speculator is not restored and learns anew: %s: %s. The file is kept "
                    "as %s", type(error).__name__, error, aside,
                )  # fmt: skip
        self._saved = progress()

    def keep(self, progress: object, now: bool = False) -> None:
        """Write the file if something has changed since and it is time to, or `now`."""
        if not self.path or progress == self._saved or not (now or time.monotonic() - self._saved_at >= SAVE_S):
            return
        self._saved_at = time.monotonic()
        try:
            self._save({"path": self.path})
        except (OSError, RuntimeError) as error:  # torch.save: a full disk is a RuntimeError
            if not self._failed:
                logger.warning("rl_accel: the head of the speculator is not saved (logged once): %s", error)
            self._failed = True
        else:
            self._saved = progress
