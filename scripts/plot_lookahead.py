"""Draw what bench_lookahead.py measured: python scripts/plot_lookahead.py OUT.png RESULT.json ...

One panel a result: milliseconds a token of each arm, with the spread of its blocks and what was predicted from parts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

COLOURS = {"plain": "tab:gray", "ahead": "tab:green", "look": "tab:blue"}
TOKEN_COLOUR = "tab:orange"


def panels(paths: Sequence[Path]) -> list[tuple[str, dict[str, Any]]]:
    """Return title and arms of each part that was timed."""
    found = []
    for path in paths:
        result = json.loads(path.read_text())
        for what, measured in result["speed"].items():
            title = f"target of {result['layers']} layers, {what}, {measured['at_a_time']} text at a time"
            found.append((title, measured["arms"]))
    return found


def draw(axes: Any, title: str, arms: dict[str, Any]) -> None:
    plain = arms["plain"]["ms_per_token"]
    for row, (name, arm) in enumerate(reversed(arms.items())):
        took = arm["ms_per_token"]
        kind = next((kind for kind in COLOURS if name.startswith(kind)), "")
        axes.barh(row, took, color=COLOURS.get(kind, TOKEN_COLOUR))
        low, high = (plain / ratio for ratio in reversed(arm["speedup_spread"]))
        if name != "plain":
            axes.plot([low, high], [row, row], color="black", linewidth=1)
        if "predicted_ms_per_token" in arm:
            axes.plot(arm["predicted_ms_per_token"], row, marker="|", color="black", markersize=12)
        axes.text(max(took, high) + 0.01 * plain, row, f" {took:.2f} ms, {plain / took:.1f} x", va="center", fontsize=8)
    axes.set_yticks(range(len(arms)), list(reversed(arms)))
    axes.set_xlim(0, 1.3 * plain)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("ms a token (line: spread of blocks; bar across: predicted from parts measured alone)", fontsize=8)


def main(out: str, *paths: str) -> None:
    found = panels([Path(path) for path in paths])
    height = sum(1.2 + 0.35 * len(arms) for _, arms in found)
    figure, all_axes = pyplot.subplots(len(found), 1, figsize=(8, height), squeeze=False)
    for axes, (title, arms) in zip(all_axes[:, 0], found, strict=True):
        draw(axes, title, arms)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
