"""Progress of a run in the terminal: a bar, and one line of metrics a step, read from the run's metrics.jsonl."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from tqdm import tqdm

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


def accuracy(metrics: dict[str, Any]) -> float | None:
    """Return verl's validation accuracy, or None in a step without validation."""
    for wanted in ("/acc/mean@", "/reward/mean@"):
        for key, value in metrics.items():
            if key.startswith("val-core/") and wanted in key:
                return float(value)
    return None


def line(step: int, metrics: dict[str, Any]) -> str:
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
        self._offset = metrics.stat().st_size if metrics.exists() else 0
        self._stop = threading.Event()
        self._bar = tqdm(total=total_steps, desc="training", unit="step", dynamic_ncols=True, smoothing=0.1)
        self._thread = threading.Thread(target=self._follow, name="rl_accel_progress", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Show what is left and stop."""
        self._stop.set()
        self._thread.join()
        self._bar.close()

    def _follow(self) -> None:
        while not self._stop.wait(self._poll_s):
            self._show_new()
        self._show_new()

    def _show_new(self) -> None:
        if not self._metrics.exists():
            return
        with self._metrics.open("rb") as file:
            file.seek(self._offset)
            chunk = file.read()
        whole = chunk[: chunk.rfind(b"\n") + 1]
        self._offset += len(whole)
        for text in whole.splitlines():
            record = json.loads(text)
            self._bar.n = max(self._bar.n, record["step"])
            self._bar.write(line(record["step"], record["data"]))
