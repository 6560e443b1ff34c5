"""Accepted draft tokens, by replay: the drafter `das` against vLLM's `suffix` (Arctic Inference) and `ngram`.

    python scripts/bench_draft.py --rollouts run_dir/rollouts.jsonl [--concurrency N] [--max-draft 5 8 16] [--json FILE]
    python scripts/bench_draft.py [--synthetic siblings drift ...] [--json FILE]

No model runs: recorded rollouts (`rl_accel.draft.record: true`; format in rl_accel/draft/record.py) are what the target
would have sampled, whatever is drafted. Without a file, rollouts are made up: several samples of a few problems over
four epochs. Two comparisons for every longest draft K:

    cap    both drafters may draft K tokens per request and step
    equal  das is held (threshold on its path probability) to the tokens per step that the incumbent drafted

The incumbents get their best of several settings, by accepted tokens per step at that cap: Arctic of tree depth 24, 64,
factor 1, 2, 4 and least token probability 0.2, 0.1, 0.05, 0; ngram of lengths 1-3, 2-4, 3-5. `bound` is a drafter that
is never wrong. Times are for this machine; ngram has none, as its drafts are vLLM's and its code is not. Costs about 20
to 100 us per recorded token, setting and K; settings run on all cores. Tests of the drafter are run by scripts/test.sh.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

from rl_accel import machine
from rl_accel.draft.record import Rollout, read_rollouts
from rl_accel.draft.replay import Arctic, Counts, Das, Ngram, ReplayResult, replay
from rl_accel.errors import DraftError
from rl_accel.hosts import versions
from rl_accel.kernels.suffix.api import MATCH_LENGTHS, SOURCES

ARCTIC_DEFAULT = (24, 1.0, 0.1)
ARCTIC_SETTINGS = tuple(product((24, 64), (1.0, 2.0, 4.0), (0.2, 0.1, 0.05, 0.0)))
NGRAM_SETTINGS = ((2, 4), (1, 3), (3, 5))
EQUAL_WITHIN = 0.03
LEAST_THRESHOLD = 1e-3

_replay: Callable[[Callable], ReplayResult]
"""`replay` of the data at hand, inherited by forked workers."""


@dataclass(frozen=True)
class Regime:
    """Made-up rollouts: phrases, or an order-2 source, that the samples of a problem share."""

    problems: int = 5
    samples: int = 8
    epochs: int = 4
    length: int = 256
    """Mean tokens of a response; lengths are log-normal."""
    reuse: float = 0.7
    """Share of a response's pieces that are phrases of its problem; the rest is fresh."""
    drift: float = 0.15
    """Share of the phrases (contexts) that are new in each epoch."""
    edit: float = 0.0
    """Probability that a token of a phrase is replaced where it is used."""
    temperature: float | None = None
    """With it, tokens come from an order-2 source with eight continuations per context instead."""
    prompt: int = 32
    """Tokens of the prompt; it is made of the problem's phrases."""


REGIMES = {
    "siblings": Regime(),
    "edited": Regime(edit=0.04),
    "drift": Regime(drift=0.6),
    "low_entropy": Regime(temperature=0.25),
    "high_entropy": Regime(temperature=1.0),
    "single": Regime(problems=40, samples=1),
    "one_epoch": Regime(problems=20, epochs=1),
    "copying": Regime(problems=16, samples=2, epochs=2, prompt=1024, drift=1.0),
}


def synthetic(regime: Regime, seed: int = 0, vocab_size: int = 32000) -> list[Rollout]:
    """Rollouts of `regime`, one step per epoch."""
    rng = np.random.default_rng(seed)
    sources = [_Phrases(regime, rng, vocab_size) for _ in range(regime.problems)]
    if regime.temperature is not None:
        sources = [_Order2(regime, rng, vocab_size) for _ in range(regime.problems)]
    prompts = [source.text(regime.prompt) for source in sources]
    rollouts = []
    for epoch in range(regime.epochs):
        for problem, source in enumerate(sources):
            for sample in range(regime.samples):
                length = max(8, int(regime.length * rng.lognormal(-0.125, 0.5)))
                text = tuple(source.text(length))
                rollouts.append(Rollout(epoch, epoch, f"p{problem}", sample, tuple(prompts[problem]), text))
            source.drift()
    return rollouts


class _Phrases:
    """Texts of phrases from a pool, with fresh Zipf tokens between them."""

    def __init__(self, regime: Regime, rng: np.random.Generator, vocab_size: int):
        self.regime, self.rng, self.vocab_size = regime, rng, vocab_size
        self.pool = [self._fresh(12, 48) for _ in range(40)]

    def _fresh(self, low: int, high: int) -> list[int]:
        tokens = self.rng.zipf(1.3, int(self.rng.integers(low, high)))
        return ((tokens - 1) % self.vocab_size).tolist()

    def text(self, length: int) -> list[int]:
        out: list[int] = []
        while len(out) < length:
            if self.rng.random() < self.regime.reuse:
                phrase = self.pool[int(self.rng.integers(len(self.pool)))]
                edited = self.rng.random(len(phrase)) < self.regime.edit
                other = self.rng.integers(0, self.vocab_size, len(phrase))
                out += np.where(edited, other, phrase).tolist()
            else:
                out += self._fresh(4, 24)
        return out[:length]

    def drift(self) -> None:
        for i in np.flatnonzero(self.rng.random(len(self.pool)) < self.regime.drift):
            self.pool[i] = self._fresh(12, 48)


class _Order2:
    """Texts whose next token depends on the last two, with eight continuations of each pair."""

    def __init__(self, regime: Regime, rng: np.random.Generator, vocab_size: int):
        self.regime, self.rng, self.vocab_size = regime, rng, vocab_size
        self.next: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def text(self, length: int) -> list[int]:
        a, b, out = 0, 0, []
        for _ in range(length):
            found = self.next.get((a, b))
            if found is None:
                logits = self.rng.gumbel(size=8) / self.regime.temperature
                odds = np.exp(logits - logits.max())
                found = self.next[a, b] = self.rng.integers(0, 48, 8), np.cumsum(odds / odds.sum())
            token = int(found[0][min(int(np.searchsorted(found[1], self.rng.random())), 7)])
            out.append(token)
            a, b = b, token
        return out

    def drift(self) -> None:
        for key in list(self.next):
            if self.rng.random() < self.regime.drift:
                del self.next[key]


def perfect(rollouts: Sequence[Rollout], max_draft: int) -> float:
    """Accepted tokens per step of a drafter that is never wrong."""
    behind_first = np.array([len(r.token_ids) - 1 for r in rollouts if r.token_ids])
    steps = -(-behind_first // (max_draft + 1))
    own = behind_first // (max_draft + 1)  # a step that ends the text by a draft token adds none of the target's own
    return float((behind_first - own).sum() / max(steps.sum(), 1))


def run(make: Callable) -> ReplayResult:
    """Replay the data at hand with a fresh drafter."""
    return _replay(make)


def run_many(makes: Sequence[Callable]) -> list[Counts]:
    """Totals of several drafters, on all cores; for counts, not for times."""
    workers = min(len(makes), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        return [result.total for result in pool.map(run, makes)]


class DasCurve:
    """Das at thresholds of the path probability; every one runs once."""

    def __init__(self, max_draft: int):
        self.max_draft = max_draft
        self._found: dict[float, Counts] = {}

    def at(self, threshold: float) -> Counts:
        if threshold not in self._found:
            self._found[threshold] = run(partial(Das, self.max_draft, threshold)).total
        return self._found[threshold]

    def drafting(self, drafted_per_request_step: float) -> tuple[float, Counts]:
        """Threshold and counts where das drafts that much; the longest drafts if it never does."""
        low, high = LEAST_THRESHOLD, 1.0
        if self.at(low).drafted_per_request_step <= drafted_per_request_step * (1 + EQUAL_WITHIN / 3):
            return low, self.at(low)
        for _ in range(14):
            middle = float(np.sqrt(low * high)) if low < 0.1 else (low + high) / 2
            ratio = self.at(middle).drafted_per_request_step / max(drafted_per_request_step, 1e-9)
            if 1 - EQUAL_WITHIN <= ratio <= 1 + EQUAL_WITHIN / 3:
                break
            low, high = (middle, high) if ratio > 1 else (low, middle)
        return middle, self.at(middle)


HEADER = f"{'':<38}{'accepted':>9}{'drafted':>9}{'accept.':>9}{'drafter':>12}{'memory':>9}\n" + (
    f"{'':<38}{'per step':>9}{'per step':>9}{'rate':>9}{'us/request':>12}{'MiB':>9}"
)


def line(name: str, counts: Counts, timed: bool = True) -> str:
    time_us = f"{counts.us_per_request_step:>12.1f}" if timed else f"{'-':>12}"
    memory = f"{counts.memory_bytes / 2**20:>9.1f}" if counts.memory_bytes else f"{'-':>9}"
    return (
        f"{name:<38}{counts.accepted_per_request_step:>9.3f}{counts.drafted_per_request_step:>9.3f}"
        f"{counts.acceptance_rate:>9.3f}{time_us}{memory}"
    )


def print_epochs(name: str, result: ReplayResult, timed: bool = True) -> None:
    for epoch, counts in result.epochs.items():
        print(line(f"{name}, epoch {epoch}", counts, timed))
    print(line(f"{name}, all epochs", result.total, timed))


def print_sources(das: Das) -> None:
    cells = das.by_source()
    for title, part in (("source of the first token", 0), ("match length", 1)):
        print(f"\n{'das by ' + title:<38}{'drafts':>9}{'drafted':>9}{'accepted':>9}{'rate':>9}")
        for name in (SOURCES, MATCH_LENGTHS)[part]:
            drafts, drafted, accepted = sum((n for key, n in cells.items() if key[part] == name), np.zeros(3, np.int64))
            print(f"  {name:<36}{drafts:>9}{drafted:>9}{accepted:>9}{accepted / max(drafted, 1):>9.3f}")


def row(name: str, das: Counts, incumbent: Counts, bound: float) -> dict:
    return {
        "name": name,
        "value": das.accepted_per_request_step,
        "unit": "tokens per request and step",
        "incumbent": incumbent.accepted_per_request_step,
        "ratio": das.accepted_per_request_step / max(incumbent.accepted_per_request_step, 1e-9),
        "bound": bound,
    }


def bench(data: str, rollouts: list[Rollout], max_draft: int, with_arctic: bool) -> list[dict]:
    """Tables and rows for one data set and cap."""
    bound = perfect(rollouts, max_draft)
    curve, rows = DasCurve(max_draft), []
    print(f"\n== {data}, drafts of at most {max_draft}\n{HEADER}")
    das_drafter = Das(max_draft)
    das = run(lambda: das_drafter)
    print_epochs("das", das)
    incumbents: list[tuple[str, str, Counts]] = []
    for kind, settings in (("Arctic", ARCTIC_SETTINGS if with_arctic else ()), ("ngram", NGRAM_SETTINGS)):
        make = Arctic if kind == "Arctic" else Ngram
        found = dict(
            zip(settings, run_many([partial(make, max_draft, *s) for s in settings]) if settings else (), strict=True)
        )
        if not found:
            continue
        best = max(found, key=lambda s: found[s].accepted_per_request_step)
        suffix = "" if kind == "Arctic" else ".ngram"
        for setting in (best, ARCTIC_DEFAULT) if kind == "Arctic" and best != ARCTIC_DEFAULT else (best,):
            result = run(partial(make, max_draft, *setting))  # again, alone: for its time
            label = f"{kind} {'-'.join(f'{x:g}' for x in setting)}"
            print_epochs(label, result, timed=kind == "Arctic")
            if setting == best:
                incumbents.append(
                    (f"draft.accepted_per_request_step.{data}.{{}}{max_draft}{suffix}", label, result.total)
                )
            else:
                incumbents.append(("", label + " (vLLM's default)", result.total))
    print_sources(das_drafter)
    print(f"\nat equal drafted tokens per step\n{HEADER}")
    for name, label, counts in incumbents:
        threshold, equal = curve.drafting(counts.drafted_per_request_step)
        less = (
            ""
            if equal.drafted_per_request_step >= counts.drafted_per_request_step * (1 - EQUAL_WITHIN)
            else ", drafts less"
        )
        print(line(label, counts, timed="ngram" not in label))
        ratio = equal.accepted_per_request_step / max(counts.accepted_per_request_step, 1e-9)
        print(f"{line(f'  das, threshold {threshold:.3g}{less}', equal)}   {ratio:.2f}x")
        if name:
            rows.append(row(name.format("cap"), das.total, counts, bound))
            rows.append(row(name.format("equal"), equal, counts, bound))
    return rows


def main() -> None:
    global _replay
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Tests of the drafter: scripts/test.sh tests/draft."
    )
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--rollouts", type=Path, help="recorded rollouts, JSON lines")
    data.add_argument(
        "--synthetic", nargs="*", choices=REGIMES, default=None, metavar="REGIME", help=", ".join(REGIMES)
    )
    parser.add_argument("--concurrency", type=int, help="most live requests; default: all of a step")
    parser.add_argument("--max-draft", type=int, nargs="+", default=[5, 8, 16], help="caps K")
    parser.add_argument("--json", type=Path, help="write the results as a list of {name, value, unit, ...}")
    options = parser.parse_args()
    print(f"{' '.join(sys.argv)}\n{machine.describe()}\n{versions.report()}")
    with_arctic = importlib.util.find_spec("arctic_inference") is not None
    if not with_arctic:
        print("Arctic Inference is not installed (scripts/install_arctic.sh does it): its rows are left out")
    sets: dict[str, list[Rollout]] = {}
    try:
        if options.rollouts:
            sets[options.rollouts.stem] = list(read_rollouts(options.rollouts))
        for name in () if options.rollouts else options.synthetic or ["siblings"]:
            sets[name] = synthetic(REGIMES[name])
        rows = []
        for name, rollouts in sets.items():
            tokens = sum(len(r.token_ids) for r in rollouts)
            started = time.perf_counter()
            print(f"\n{name}: {len(rollouts)} rollouts, {tokens} tokens")
            _replay = lambda make, rollouts=rollouts: replay(rollouts, make(), options.concurrency)  # noqa: E731
            for max_draft in options.max_draft:
                rows += bench(name, rollouts, max_draft, with_arctic)
            print(f"\n{name}: {time.perf_counter() - started:.0f} s")
    except (DraftError, OSError) as error:
        sys.exit(f"bench_draft: {error}")
    print()
    for found in rows:
        print(f"{found['name']:<60} {found['value']:7.3f} against {found['incumbent']:7.3f}  {found['ratio']:6.2f}x")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
