"""Write docs/metrics.md from the tables of metrics: `python scripts/make_docs.py`. A test compares the two."""

from __future__ import annotations

from pathlib import Path

from rl_accel.feature import Metric, features
from rl_accel.hosts.verl.metrics import METRICS

TARGET = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"
HEAD = """# Metrics

Made by `scripts/make_docs.py` from the tables in the code. Recorded every step in `metrics.jsonl` and wandb, beside
verl's own. All are per training step; validation does not count.

## Of every run

"""
TAIL = """
verl's own that are worth watching: `timing_s/gen` (rollout seconds), `timing_s/step`, `critic/score/mean` (reward),
`val-core/*/acc/mean@*`, `training/rollout_probs_diff_max`, `training/rollout_actor_probs_pearson_corr`. A run stops
when the probabilities of engine and trainer are not a number or do not belong together.
"""
OVER = {
    "rank": "Reduced over ranks and updates of the step; verl writes them under `actor/` and `critic/`.",
    "both": "Reduced over rollout engines; those of training ranks over ranks and updates, under `actor/`.",
    "engine": "Reduced over rollout engines.",
}


def table(lines: tuple[Metric, ...], prefix: str = "") -> str:
    """Return a table in Markdown."""
    rows = [f"| `{prefix}{line.name}` | {line.unit} | {line.reduction} | {line.meaning} |" for line in lines]
    return "\n".join(["| name | unit | reduction | meaning |", "|---|---|---|---|", *rows, ""])


def metrics_page() -> str:
    """Return docs/metrics.md."""
    parts = [HEAD, table(METRICS)]
    for name, feature in features().items():
        if feature.metrics:
            over = OVER["both" if feature.rank and feature.engine else "rank" if feature.rank else "engine"]
            parts.append(f"\n## `{name}`: {feature.title}\n\n{over}\n\n{table(feature.metrics, f'rl_accel/{name}/')}")
    return "".join(parts) + TAIL


if __name__ == "__main__":
    TARGET.write_text(metrics_page(), encoding="utf-8")
    print(TARGET)
