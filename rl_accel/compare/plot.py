"""Training curves as small multiples in one PNG: for one run, or for arms over seeds.

Leaves out smoothing: a line shows what was logged. A seed is a thin line, an arm's mean over its seeds a
thick one (over the steps that all its runs have). Arms later than the first are dashed, so that identical
curves stay visible.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from rl_accel.compare.runs import Run, group_arms
from rl_accel.compare.speed import TIMED, WARMUP_STEPS
from rl_accel.errors import CompareError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = {
    "reward": ("Reward", "mean score"),
    "accuracy": ("Validation accuracy", "fraction correct"),
    "response_length": ("Response length", "tokens"),
    "rollout_s": ("Rollout time", "seconds per step"),
    "step_s": ("Step time", "seconds per step"),
    "accept_length": ("Accept length", "tokens per verification"),
}
"""quantity -> title, unit"""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, safe for color-blind readers."""


def plot_runs(runs: Sequence[Run], path: str | Path, title: str) -> None:
    """Write the curves of runs, an arm in a color, to a PNG; panels without data are left out.

    Args:
        runs: at least one
        path: the PNG; its folder is made, and the file appears whole or not at all
        title: one line or more; long ones are wrapped

    Raises:
        CompareError: the runs logged nothing that a panel shows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels = [quantity for quantity in PANELS if any(run.series(quantity) for run in runs)]
    if not panels:
        raise CompareError("nothing to plot: no reward, accuracy, response length or timing was logged")
    arms = group_arms(runs)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    width = max(4.3 * columns, 6.5)  # inches, as all that follows
    lines = [textwrap.fill(line, int(width / 0.088), subsequent_indent="    ") for line in _plain(title).split("\n")]
    text = "\n".join(lines)
    headroom = 0.45 + 0.19 * text.count("\n")
    height = 2.7 * rows + headroom + 0.45
    figure = Figure(figsize=(width, height), dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, quantity in zip(axes, panels, strict=False):
        _draw_panel(axis, quantity, arms)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    handles = [
        Line2D([], [], color=_color(i), linestyle=_dashes(i), linewidth=2.2, label=_legend(arm, members))
        for i, (arm, members) in enumerate(arms.items())
    ]
    if any(run.series("response_length_p95") for run in runs):
        handles.append(Line2D([], [], color="0.4", linestyle=":", linewidth=1.3, label="95th percentile of length"))
    figure.legend(handles=handles, loc="lower center", ncols=min(4, len(handles)), frameon=False, fontsize=9.5)
    figure.text(0.012, 1 - 0.12 / height, text, ha="left", va="top", fontsize=10.5, fontweight="bold")
    figure.tight_layout(rect=(0, 0.42 / height, 1, 1 - headroom / height), w_pad=2.0, h_pad=1.6)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        figure.savefig(partial, format="png", facecolor="white")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _draw_panel(axis: Axes, quantity: str, arms: Mapping[str, Sequence[Run]]) -> None:
    from matplotlib.ticker import MaxNLocator

    for i, runs in enumerate(arms.values()):
        series = [s for run in runs if (s := run.series(quantity))]
        for values in series if len(series) > 1 else []:
            axis.plot(list(values), list(values.values()), color=_color(i), linewidth=0.7, alpha=0.4)
        steps, means = _mean(series)
        marker = "o" if quantity == "accuracy" or len(steps) == 1 else ""
        (line,) = axis.plot(steps, means, color=_color(i), linestyle=_dashes(i), linewidth=1.9)
        line.set(marker=marker, markersize=4)
        if quantity == "response_length":
            steps, tails = _mean([s for run in runs if (s := run.series("response_length_p95"))])
            axis.plot(steps, tails, color=_color(i), linestyle=":", linewidth=1.3)
    title, unit = PANELS[quantity]
    axis.set_title(title, fontsize=10.5, loc="left")
    axis.set_xlabel("training step", fontsize=9)
    axis.set_ylabel(unit, fontsize=9)
    axis.tick_params(labelsize=8.5)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    axis.grid(True, color="0.9", linewidth=0.7)
    axis.spines[["top", "right"]].set_visible(False)
    if quantity in TIMED:
        _fit_warm_steps(axis, [run.series(quantity) for runs in arms.values() for run in runs])
    if quantity == "response_length":
        axis.set_ylim(bottom=0)


def _fit_warm_steps(axis: Axes, series: Sequence[Mapping[int, float]]) -> None:
    """Scale a time axis to the steps after warm-up, and say so where the first ones leave it."""
    warm = [value for values in series for value in list(values.values())[WARMUP_STEPS:]]
    peak = max((value for values in series for value in values.values()), default=0.0)
    axis.set_ylim(bottom=0)
    if warm and peak > 1.8 * max(warm):
        axis.set_ylim(top=1.25 * max(warm))
        axis.text(
            0.98,
            0.97,
            f"warm-up: up to {peak:.3g} s",
            transform=axis.transAxes,
            ha="right",
            va="top",
            fontsize=8,
        )


def _mean(series: Sequence[Mapping[int, float]]) -> tuple[list[int], np.ndarray]:
    steps = sorted(set(series[0]).intersection(*series[1:])) if series else []
    return steps, np.array([[values[step] for step in steps] for values in series]).mean(axis=0) if steps else np.zeros(
        0
    )


def _legend(arm: str, runs: Sequence[Run]) -> str:
    return _plain(f"{arm} (mean of {len(runs)} runs)" if len(runs) > 1 else arm)


def _plain(text: str) -> str:
    """Names are text, not formulas; bytes of a folder's name that are no text become question marks."""
    return text.replace("$", r"\$").encode("utf-8", "replace").decode()


def _color(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _dashes(i: int) -> Literal["-"] | tuple[float, tuple[float, float]]:
    return "-" if i == 0 else (0, (3.5, 1.2 + 0.5 * (i % 3)))
