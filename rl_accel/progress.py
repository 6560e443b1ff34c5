"""Progress of a run in the terminal: a bar, and one line of metrics a step, read from the run's metrics.jsonl.

Nothing that goes wrong here reaches the run: a line that cannot be read is left out and the first one is logged, and
a terminal that is gone ends the display only.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from rl_accel.compare.reading import parse_metrics_line
from rl_accel.errors import CompareError

logger = logging.getLogger("rl_accel")

SHOWN = (
    ("reward", "critic/score/mean", ".3f"),
    ("len", "response_length/mean", ".0f"),
    ("p95", "response_length/p95", ".0f"),
    ("rollout", "timing_s/gen", ".2f"),
    ("step", "timing_s/step", ".2f"),
    ("accept", "rollout/spec_accept_length", ".2f"),
    ("|Δp|", "training/rollout_probs_diff_max", ".1e"),
)
"""Label, metric, format. `rollout` and `step` are seconds."""


def accuracy(metrics: Mapping[str, float]) -> float | None:
    """Return verl's validation accuracy, or None in a step without validation."""
    for wanted in ("/acc/mean@", "/reward/mean@"):
        for key, value in metrics.items():
            if key.startswith("val-core/") and wanted in key:
                return value
    return None


def line(step: int, metrics: Mapping[str, float]) -> str:
    """Return the one line that is shown for a step."""
    parts = [f"{label} {metrics[key]:{form}}" for label, key, form in SHOWN if key in metrics]
    value = accuracy(metrics)
    if value is not None:
        parts.append(f"val acc {value:.3f}")
    return f"step {step}: " + "  ".join(parts)


class Progress:
    """Follows metrics.jsonl in a thread until `close`."""

    def __init__(self, metrics: Path, total_steps: int | None, poll_s: float = 0.2):
        self._metrics, self._poll_s = metrics, poll_s
        self._offset = _end_of_last_line(metrics)
        self._warned = False
        self._stop = threading.Event()
        self._bar = tqdm(total=total_steps, desc="training", unit="step", dynamic_ncols=True, smoothing=0.1)
        self._thread = threading.Thread(target=self._follow, name="rl_accel_progress", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Show what is left and stop."""
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        try:
            while not self._stop.wait(self._poll_s):
                self._show_new()
            self._show_new()
            self._bar.close()
        except Exception as error:
            logger.warning("the progress display ended, the run goes on: %s: %s", type(error).__name__, error)

    def _show_new(self) -> None:
        try:
            with self._metrics.open("rb") as file:
                file.seek(self._offset)
                chunk = file.read()
        except OSError:  # no step yet, or a file system that does not answer: the next poll tries again
            return
        whole = chunk[: chunk.rfind(b"\n") + 1]
        for text in whole.split(b"\n")[:-1]:
            self._show(text)
        self._offset += len(whole)

    def _show(self, text: bytes) -> None:
        try:
            step, metrics = parse_metrics_line(text, f"a line of {self._metrics}")
        except CompareError as error:
            if not self._warned:
                self._write(f"progress: {error} (later ones are left out without a word)")
            self._warned = True
            return
        self._bar.n = max(self._bar.n, step)
        self._write(line(step, metrics))

    def _write(self, text: str) -> None:
        encoding = sys.stdout.encoding or "utf-8"
        self._bar.write(text.encode(encoding, "replace").decode(encoding))


def _end_of_last_line(path: Path) -> int:
    """Where a resumed run goes on: it writes over the torn line that a killed run left."""
    try:
        return path.read_bytes().rfind(b"\n") + 1
    except OSError:
        return 0
