"""Figures of 4-bit communication as metrics of an update."""

from __future__ import annotations

from typing import Any

_COUNTED = (
    "gradient_intra_bytes",
    "gradient_inter_bytes",
    "weight_intra_bytes",
    "weight_inter_bytes",
    "gradients_s",
    "weights_s",
    "weight_resyncs",
)


def metrics(before: dict[str, Any], after: dict[str, Any]) -> dict[str, list[float]]:
    """Return the metrics of one update of one rank, `rl_accel/comm/*`, from `Handle.stats()` on both sides of it.

    Each is a list, which verl joins over ranks and updates and averages.
    """
    found = {f"rl_accel/comm/{name}": [float(after[name] - before[name])] for name in _COUNTED}
    for what in ("gradients", "weights"):
        found[f"rl_accel/comm/{what}_quantised"] = [float(before[f"{what}_quantised"])]
    return found
