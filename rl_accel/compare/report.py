"""The outcome of a comparison in words, as markdown, as JSON, and as a wandb run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rl_accel.compare.identity import Identity
from rl_accel.compare.runs import Run
from rl_accel.compare.speed import WARMUP_STEPS, Speed
from rl_accel.compare.verdict import Comparison, Criteria
from rl_accel.errors import CompareError

Arms = Mapping[str, Sequence[Run]]


def _first(values: np.ndarray) -> float:
    return float(values[0])


def _last(values: np.ndarray) -> float:
    return float(values[-1])


def _warm_median(values: np.ndarray) -> float:
    return float(np.median(values[WARMUP_STEPS:])) if len(values) > WARMUP_STEPS else math.nan


TABLE: tuple[tuple[str, str, Callable[[np.ndarray], Any]], ...] = (
    ("reward, last step", "reward", _last),
    ("reward, mean", "reward", np.mean),
    ("accuracy, first", "accuracy", _first),
    ("accuracy, final", "accuracy", _last),
    ("response length, mean (tokens)", "response_length", np.mean),
    ("response length, p50 (tokens)", "response_length_p50", np.mean),
    ("response length, p95 (tokens)", "response_length_p95", np.mean),
    ("response length, longest (tokens)", "response_length_max", np.max),
    ("rollout, median (s)", "rollout_s", _warm_median),
    ("step, median (s)", "step_s", _warm_median),
    ("slowest request, median (s)", "slowest_request_s", _warm_median),
    ("accept length, mean (tokens)", "accept_length", np.mean),
    ("accept rate, mean", "accept_rate", np.mean),
    ("policy loss, last step", "pg_loss", _last),
    ("gradient norm, median", "grad_norm", np.median),
    ("rollout/trainer probability difference, largest", "probs_diff_max", np.max),
)
"""Row of the table, quantity, and how a run's steps become one number; an arm shows its runs' mean."""

_SPEED_NAMES = {"rollout_s": "rollout", "step_s": "step"}


def sentence(comparison: Comparison) -> str:
    """The verdict in a line; brackets hold the 97.5 % interval of a speed."""
    word = comparison.word
    if word == "identical":
        steps = min(identity.steps for identity in comparison.identities)
        what = "tokens and metrics" if _with_tokens(comparison.identities) else "metrics, no tokens to compare"
        word = f"identical over {steps} steps ({what})"
        if comparison.unpaired:
            word += f", {comparison.unpaired} runs without a partner left out"
    else:
        parted = [i.last_identical_step for i in comparison.identities if i.last_identical_step is not None]
        agreed = f", identical up to step {min(parted)}" if len(parted) == len(comparison.identities) else ""
        word = f"{word}: {comparison.reason}{agreed}"
    speeds = [f"{_SPEED_NAMES[speed.quantity]} {_speed_words(speed)}" for speed in comparison.speeds]
    return "; ".join([f"{comparison.other} vs {comparison.baseline}: {word}", *speeds])


def notes(arms: Arms) -> list[str]:
    """What a reader must know before trusting the comparison: runs that differ in more than the arm."""
    runs = [run for members in arms.values() for run in members]
    found = []
    for key in ("recipe", "git_sha", "versions", "machine"):
        values = {str(run.info[key]) for run in runs if key in run.info}
        if len(values) > 1:
            found.append(f"The runs differ in `{key}`: {' / '.join(sorted(values))}")
    for arm, members in arms.items():
        if len(members) > 1 and any(run.seed is None for run in members):
            found.append(f"Arm {arm} has runs of unknown seed: they are taken to be independent")
    return found


def summaries(arms: Arms) -> dict[str, dict[str, tuple[float, float]]]:
    """arm -> row of the table -> (mean, standard deviation over runs, NaN for one run)."""
    table: dict[str, dict[str, tuple[float, float]]] = {arm: {} for arm in arms}
    for arm, runs in arms.items():
        for row, quantity, reduce in TABLE:
            columns = [np.array(list(s.values())) for run in runs if (s := run.series(quantity))]
            values = [float(reduce(column)) for column in columns]
            if values:
                deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
                table[arm][row] = (float(np.mean(values)), deviation)
    return table


def markdown(arms: Arms, comparisons: Sequence[Comparison], criteria: Criteria) -> str:
    """The report that is printed and saved."""
    lines = ["# Comparison of runs", ""]
    lines += [f"- **{sentence(comparison)}**" for comparison in comparisons]
    lines += [f"- Note: {note}." for note in notes(arms)]
    lines += ["", *_table(arms, comparisons), ""]
    for comparison in comparisons:
        lines += [f"## {comparison.other} against {comparison.baseline}", ""]
        lines += [
            *_identity_lines(comparison),
            "",
            *_obstacle_lines(comparison),
            *_test_lines(comparison, criteria),
            *_speed_lines(comparison),
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


def as_json(arms: Arms, comparisons: Sequence[Comparison], criteria: Criteria) -> dict[str, Any]:
    """Everything in the report, with null for what is not a number."""
    runs = [run for members in arms.values() for run in members]
    return _without_nan(
        {
            "baseline": next(iter(arms)),
            "comparisons": [{"sentence": sentence(c), **asdict(c)} for c in comparisons],
            "arms": {
                arm: {row: {"mean": mean, "std": std} for row, (mean, std) in rows.items()}
                for arm, rows in summaries(arms).items()
            },
            "runs": [
                {"source": r.source, "name": r.name, "arm": r.arm, "seed": r.seed, "finished": r.finished} for r in runs
            ],
            "criteria": {**asdict(criteria), "warmup_steps": WARMUP_STEPS},
            "notes": notes(arms),
        }
    )


def log_wandb(project: str, arms: Arms, comparisons: Sequence[Comparison], picture: Path) -> None:
    """Log table, picture and verdicts as one wandb run; WANDB_MODE decides whether it leaves the machine.

    Raises:
        CompareError: wandb does not start.
    """
    import wandb

    table = summaries(arms)
    rows = [row for row, _, _ in TABLE if any(row in values for values in table.values())]
    data = [[row, *(table[arm].get(row, (math.nan,))[0] for arm in arms)] for row in rows]
    try:
        run = wandb.init(project=project, job_type="compare", name="compare " + ", ".join(arms))
    except wandb.errors.Error as error:
        raise CompareError(f"wandb does not start: {error}. Log in, or set WANDB_MODE=offline") from error
    with run:
        run.log(
            {
                "compare/table": wandb.Table(columns=["", *arms], data=data),
                "compare/curves": wandb.Image(str(picture)),
            }
        )
        for c in comparisons:
            run.summary[f"compare/{c.other}/verdict"] = c.word
            run.summary[f"compare/{c.other}/sentence"] = sentence(c)
            for speed in c.speeds:
                run.summary[f"compare/{c.other}/{_SPEED_NAMES[speed.quantity]}_ratio"] = speed.ratio


def _table(arms: Arms, comparisons: Sequence[Comparison]) -> list[str]:
    table = summaries(arms)
    rows = [["", *arms], ["---", *("---:" for _ in arms)]]
    rows.append(["runs", *(str(len(members)) for members in arms.values())])
    for row, _, _ in TABLE:
        if any(row in values for values in table.values()):
            rows.append([row, *(_cell(*table[arm][row]) if row in table[arm] else "–" for arm in arms)])
    for quantity, name in _SPEED_NAMES.items():
        ratios = {c.other: s for c in comparisons for s in c.speeds if s.quantity == quantity}
        if ratios:
            cells = (f"{ratios[arm].ratio:.2f}" if arm in ratios else "–" for arm in list(arms)[1:])
            rows.append([f"{name} speed-up (paired runs)", "1", *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows[1] = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [
        "| "
        + " | ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        + " |"
        for row in rows
    ]


def _cell(mean: float, deviation: float) -> str:
    if math.isnan(mean):
        return "–"
    return f"{mean:.4g}" if math.isnan(deviation) else f"{mean:.4g} ± {deviation:.2g}"


def _identity_lines(comparison: Comparison) -> list[str]:
    lines = [f"Runs are paired by {comparison.paired_by}."]
    for identity in comparison.identities:
        lines.append(f"- {identity.run_b} / {identity.run_a}: {describe_identity(identity)}")
    return lines


def describe_identity(identity: Identity) -> str:
    """How far a pair of runs is identical, and where it parts."""
    if identity.steps == 0:
        return "no common step"
    last = identity.last_identical_step
    agreed = "from the first step on, they differ" if last is None else f"identical up to step {last}"
    if identity.divergence is not None:
        p = identity.divergence
        where = f"step {p.step}, problem {p.problem_id}, sample {p.sample_index}"
        what = {
            "token": f"token {p.position} of the response: {p.token_a} became {p.token_b}",
            "length": f"token {p.position} of the response: {_token(p.token_a)} became {_token(p.token_b)}",
            "prompt": "the prompts have other lengths",
            "row": "the response exists on one side only",
        }[p.reason]
        rows = f"{p.rows_different} of {p.rows} rows of the step differ"
        return f"{agreed}; tokens diverge at {where}, {what} ({rows})"
    basis = "tokens and metrics" if identity.basis == "tokens" else "metrics only, there are no common token files"
    if identity.metric is not None:
        m = identity.metric
        return (
            f"{agreed} ({basis}); the first metric to differ is `{m.metric}` at step {m.step}: "
            f"{m.value_a!r} became {m.value_b!r}" + (", with equal tokens" if identity.basis == "tokens" else "")
        )
    return f"identical up to step {last}, all {identity.steps} common steps ({basis})"


def _obstacle_lines(comparison: Comparison) -> list[str]:
    if not comparison.obstacles:
        return []
    return ["No verdict can be given on these runs:", *(f"- {text}" for text in comparison.obstacles), ""]


def _token(token: int | None) -> str:
    return "the end" if token is None else str(token)


def _test_lines(comparison: Comparison, criteria: Criteria) -> list[str]:
    lines = []
    if comparison.tests:
        lines += [
            f"Welch's t-test (two-sided, Holm over {len(comparison.tests)} metrics) and TOST on one number "
            f"per run, its mean over the last half of the common steps; alpha {criteria.alpha:g}.",
            "",
            "| metric | steps | baseline | other | margin | p different | p equivalent | verdict |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
        ]
        lines += [
            f"| {t.quantity} | {t.steps} | {t.mean_a:.4g} | {t.mean_b:.4g} | ±{t.margin:.3g} "
            f"| {t.p_different:.3g} | {t.p_equivalent:.3g} | {t.word} |"
            for t in comparison.tests
        ]
        lines.append("")
    elif comparison.differences and not comparison.obstacles:
        lines += ["No test over seeds: it needs two runs in each arm.", ""]
    if comparison.differences:
        lines += [
            "| per-step difference | steps | mean | std | largest |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        lines += [
            f"| {d.quantity} | {d.steps} | {d.mean:+.4g} | {d.std:.3g} | {d.largest:.4g} |"
            for d in comparison.differences
        ]
        lines.append("")
    return lines


def _speed_lines(comparison: Comparison) -> list[str]:
    if not comparison.speeds:
        return ["No timings that both arms have."]
    lines = [
        "Speed is baseline seconds / other seconds of the same step: the median of each pair of runs, then the "
        f"geometric mean over pairs; the first {WARMUP_STEPS} steps are dropped as warm-up."
    ]
    if not all(i.basis == "tokens" and i.divergence is None for i in comparison.identities):
        lines[0] += " The rollouts are not shown to be identical: the arms may not have done the same work."
    for s in comparison.speeds:
        if s.interval is None:
            judged = "one pair of runs, whose steps say nothing about the next run: no claim"
        else:
            judged = f"97.5 % t interval over {s.pairs} pairs {s.interval[0]:.3f} to {s.interval[1]:.3f}: {s.word}"
        q1, q3 = s.quartiles
        lines.append(
            f"- {_SPEED_NAMES[s.quantity]}: {s.ratio:.3f}, quartiles of {s.steps} steps {q1:.3f} to {q3:.3f}, {judged}"
        )
    return lines


def _speed_words(speed: Speed) -> str:
    if speed.interval is None:
        return f"ratio {speed.ratio:.2f} in one pair of runs, no claim"
    low, high = speed.interval
    if speed.word == "slower":
        return f"{1 / speed.ratio:.2f}x slower [{1 / high:.2f}, {1 / low:.2f}]"
    if speed.word == "faster":
        return f"{speed.ratio:.2f}x faster [{low:.2f}, {high:.2f}]"
    return f"{speed.word} [{low:.2f}, {high:.2f}]"


def _with_tokens(identities: Sequence[Identity]) -> bool:
    return all(identity.basis == "tokens" for identity in identities)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
