"""The one rule for what may be claimed about two arms: which runs are whole, comparable and independent.

A verdict other than "undecided", "identical" included, needs of all runs of both arms: none is given twice or is a
copy of another, no seed occurs twice in an arm, all finished, all have the same steps, and what is tested is finite
at every step. Everything that stands in the way is told in words that name the run.

Leaves out: whether the arms differ in more than they should (`report.notes` shows recipe, commit, versions and
machine), and a copy that somebody edited.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from rl_accel.compare.identity import may_differ
from rl_accel.compare.runs import Run
from rl_accel.compare.tokens import token_steps

TESTED = ("reward", "accuracy", "response_length")


class Candidate:
    """A run with what tells it from others."""

    def __init__(self, run: Run, runs: Sequence[Run]):
        self.run = run
        twins = sum(run.name == other.name for other in runs)
        self.label = f"run {run.name if twins == 1 else run.source}"
        self.place = Path(run.source).resolve()
        trained = {name for name in run.metrics if not may_differ(name)}
        self.training = _hash(run, trained) if trained else None
        # Without a timing, runs that train identically cannot be told from copies.
        self.measurement = _hash(run, set(run.metrics)) if trained < run.metrics.keys() else None

    def is_same_run(self, other: Candidate) -> bool:
        """One folder or file, or equal in every metric to the last bit, times included."""
        copied = self.measurement is not None and self.measurement == other.measurement
        return self.place == other.place or copied


def obstacles(baseline: Sequence[Run], other: Sequence[Run]) -> list[str]:
    """What stands in the way of a verdict, the gravest first; empty if nothing does."""
    runs = [*baseline, *other]
    candidates = [Candidate(run, runs) for run in runs]
    found = [*_copies(candidates)]
    found += [*_dependent(candidates[: len(baseline)]), *_dependent(candidates[len(baseline) :])]
    found += _unfinished(candidates)
    found += _uneven("step", [(c, c.run.steps()) for c in candidates])
    tokens = [(c, set(token_steps(c.run.tokens_dir))) for c in candidates]
    found += _uneven("token file of step", [(c, steps) for c, steps in tokens if steps])
    for quantity in TESTED:
        found += _uneven_quantity(quantity, candidates)
        found += _not_finite(quantity, candidates)
    return found


def independent_pairs(pairs: Sequence[tuple[Run, Run]]) -> list[tuple[Run, Run]]:
    """The pairs whose timings are measurements of their own: a run or a copy that occurred before adds none."""
    runs = [run for pair in pairs for run in pair]
    candidates = [Candidate(run, runs) for run in runs]
    kept = []
    for i, pair in enumerate(pairs):
        a, b = candidates[2 * i : 2 * i + 2]
        earlier = candidates[: 2 * i]
        if not a.is_same_run(b) and not any(c.is_same_run(e) for c in (a, b) for e in earlier):
            kept.append(pair)
    return kept


def _copies(candidates: Sequence[Candidate]) -> Iterator[str]:
    for i, c in enumerate(candidates):
        for earlier in candidates[:i]:
            if c.place == earlier.place:
                yield f"{c.label} is given twice"
            elif c.is_same_run(earlier):
                yield f"{earlier.label} and {c.label} are copies: equal to the last bit, times included"


def _dependent(arm: Sequence[Candidate]) -> Iterator[str]:
    """Runs of one arm that are one measurement."""
    for i, c in enumerate(arm):
        for earlier in arm[:i]:
            names = f"{earlier.label} and {c.label}"
            if c.run.seed is not None and c.run.seed == earlier.run.seed:
                yield f"two runs of arm {c.run.arm} have seed {c.run.seed}: {names}"
            elif c.training is not None and c.training == earlier.training:
                yield f"{names} of arm {c.run.arm} trained the same to the last bit: they do not count twice"


def _unfinished(candidates: Sequence[Candidate]) -> Iterator[str]:
    longest = max(max(c.run.steps()) for c in candidates)
    for c in candidates:
        last = max(c.run.steps())
        at = f"step {last} of {longest}" if last < longest else f"step {last}"
        if c.run.finished is False:
            yield f"{c.label} did not finish: it stopped at {at}"
        elif c.run.finished is None:
            yield (
                f"{c.label} does not say whether it finished (it has {at}); if it did, write "
                '{"finished": true} to run.json in its folder'
            )


def _uneven(what: str, owners: Sequence[tuple[Candidate, set[int]]]) -> Iterator[str]:
    """Runs that lack a step which another has."""
    for c, steps in owners:
        fuller, missing = next(((f, sorted(more - steps)) for f, more in owners if more - steps), (c, []))
        if not missing:
            continue
        if missing[0] > max(steps):
            yield (
                f"{c.label} ends with {what} {max(steps)}, {fuller.label} with {missing[-1]}: only runs of equal "
                "length are judged"
            )
        else:
            yield f"{c.label} lacks {what} {_some(missing)}, which {fuller.label} has"


def _not_finite(quantity: str, candidates: Sequence[Candidate]) -> Iterator[str]:
    for c in candidates:
        logged = c.run.logged(quantity)
        bad = sorted(logged.keys() - c.run.series(quantity).keys())
        if bad:
            to_the_end = len(bad) > 1 and bad == [step for step in logged if step >= bad[0]]
            where = f"from step {bad[0]} on" if to_the_end else f"at step {_some(bad)}"
            yield f"{_words(quantity)} of {c.label} is NaN or infinite {where}"


def _uneven_quantity(quantity: str, candidates: Sequence[Candidate]) -> Iterator[str]:
    logged = [(c, set(c.run.logged(quantity))) for c in candidates]
    having = [(c, steps) for c, steps in logged if steps]
    for c, steps in logged if having else []:
        first = having[0][0]
        if not steps:
            yield f"{c.label} logged no {_words(quantity)}, {first.label} did"
        elif c.run.keys(quantity) != first.run.keys(quantity):
            yield f"{c.label} and {first.label} measure {_words(quantity)} by different metrics"
    if quantity == "accuracy":
        # A resumed run validates once more where it goes on: points between may differ, the last one must not.
        union = set().union(*(steps for _, steps in having))
        having = [(c, {step for step in union if step <= max(steps)}) for c, steps in having]
    yield from _uneven(f"{_words(quantity)} at step", having)


def _some(steps: Sequence[int]) -> str:
    return f"{steps[0]}" + (f" and {len(steps) - 1} more" if len(steps) > 1 else "")


def _words(quantity: str) -> str:
    return quantity.replace("_", " ")


def _hash(run: Run, names: set[str]) -> bytes:
    """Over the metrics named, to the last bit."""
    state = hashlib.sha256()
    for name in sorted(names):
        state.update(name.encode())
        for step, value in sorted(run.metrics[name].items()):
            state.update(struct.pack("<qd", step, value))
    return state.digest()
