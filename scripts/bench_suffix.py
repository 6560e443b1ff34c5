"""The suffix index against Arctic Inference's suffix tree: time and memory of matching, drafting and appending.

    python scripts/bench_suffix.py [--repeats 5] [--json FILE]

One process, one core, the same data for all: 64 problems with 8 past rollouts of 2048 tokens (a closed epoch for the
index, cached responses for Arctic) and 8 live siblings each, 1000 tokens in. A step gives each of the 512 live requests
its next token and asks for drafts of at most 24 tokens. Contenders take turns, 20 steps at a time.

    propose_512       SuffixIndex.propose_batch, arrays made anew for every step; threshold 0.1
    propose_512_cold  the same after 256 MiB of other memory were read, as an engine's step does
    rows_512          SuffixIndex.propose_rows from a matrix of all texts, as vLLM keeps it, with Python lists out
    drafter_512       SuffixDrafter.propose, Python lists in and out; threshold 0.1
    budget_512        the same with the length-aware budget, which plans anew every 16 steps (see p95)
    Arctic            add_active_response + speculate per request, as vLLM does; factor 1, token probability 0.1

`ratio` is against tree depth 24, vLLM's default; depth 64 is printed. `bound`: for a step, reading one random word of
memory per request; for bytes, the token itself. Opening history is compared with inserting it into Arctic's tree again,
which has no file. Accepted tokens (on the true continuation) are printed to show that drafts make sense. Steps beside a
busy GPU: bench_propose_overlap.py. Tests of the index are run by scripts/test.sh.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rl_accel import machine
from rl_accel.draft.config import DraftConfig
from rl_accel.draft.drafter import SuffixDrafter
from rl_accel.draft.replay import Das
from rl_accel.hosts import versions
from rl_accel.kernels.suffix.api import SuffixIndex, problem_key

NUM_PROBLEMS, NUM_SAMPLES = 64, 8
PAST_LENGTH, LIVE_LENGTH = 2048, 1000
CAP, THRESHOLD = 24, 0.1
STEPS = 20
WARM_UP = 3
VOCAB_SIZE = 32000
NONE = np.zeros(0, np.int32)


@dataclass
class Workload:
    """Past and live rollouts; row i of `live` belongs to problem i // NUM_SAMPLES."""

    past: list[list[np.ndarray]]
    live: np.ndarray
    """int32 [512, T]"""

    @classmethod
    def make(cls, length: int, seed: int = 0) -> Workload:
        rng = np.random.default_rng(seed)
        fresh = ((rng.zipf(1.3, 1 << 20) - 1) % VOCAB_SIZE).astype(np.int32)

        def piece(low: int, high: int) -> np.ndarray:
            start = int(rng.integers(len(fresh) - high))
            return fresh[start : start + int(rng.integers(low, high))]

        past, live = [], []
        for _ in range(NUM_PROBLEMS):
            phrases = [piece(12, 48) for _ in range(200)]

            def text(size: int, phrases: list[np.ndarray] = phrases) -> np.ndarray:
                parts, total = [], 0
                while total < size:
                    parts.append(phrases[int(rng.integers(200))] if rng.random() < 0.7 else piece(4, 24))
                    total += len(parts[-1])
                return np.concatenate(parts)[:size]

            past.append([text(PAST_LENGTH) for _ in range(NUM_SAMPLES)])
            live += [text(length) for _ in range(NUM_SAMPLES)]
        return cls(past, np.stack(live))

    @property
    def past_tokens(self) -> int:
        return NUM_PROBLEMS * NUM_SAMPLES * PAST_LENGTH

    def accepted(self, drafts: list[list[int]], position: int) -> int:
        """Draft tokens that are right when rows have `position` tokens."""
        total = 0
        for row, draft in zip(self.live, drafts, strict=True):
            truth = row[position : position + len(draft)].tolist()
            total += next((k for k, (a, b) in enumerate(zip(draft, truth, strict=False)) if a != b), len(truth))
        return total


def arrays(handles: list[int], rows: list[np.ndarray], cap: int = CAP) -> tuple[np.ndarray, ...]:
    n = len(handles)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.uint32)
    return (
        np.array(handles, np.int64),
        np.concatenate([NONE, *rows]),
        offsets,
        np.full(n, cap, np.uint32),
        np.full(n, THRESHOLD, np.float32),
    )


def load_past(index: SuffixIndex, data: Workload) -> tuple[float, float]:
    """Insert and close the past rollouts; returns seconds of the appends and of the close."""
    append_s = 0.0
    for problem, rollouts in enumerate(data.past):
        for rollout in rollouts:
            handle = index.begin(problem_key(problem), NONE)
            step = arrays([handle], [rollout], cap=0)
            started = time.perf_counter()
            index.propose_batch(*step)
            append_s += time.perf_counter() - started
            index.end(handle, keep=True)
    started = time.perf_counter()
    index.close_epoch(0)
    return append_s, time.perf_counter() - started


class Batch:
    """SuffixIndex with flat arrays, or with a matrix of rows."""

    def __init__(self, data: Workload, rows: bool = False, cold: bool = False):
        self.data, self.rows = data, rows
        self.index = SuffixIndex(max_draft=CAP)
        self.append_s, self.close_s = load_past(self.index, data)
        self.handles = [self.index.begin(problem_key(i // NUM_SAMPLES), NONE) for i in range(len(data.live))]
        self.index.propose_batch(*arrays(self.handles, list(data.live[:, :LIVE_LENGTH]), cap=0))
        self.other = np.ones(1 << 25) if cold else None

    def step(self, position: int) -> tuple[float, list[list[int]]]:
        n = len(self.handles)
        step = arrays(self.handles, list(self.data.live[:, position : position + 1]))
        numbers, lengths = np.arange(n, dtype=np.uint32), np.full(n, position + 1, np.uint32)
        if self.other is not None:
            self.other.sum()
        started = time.perf_counter()
        if self.rows:
            drafts = self.index.propose_rows(step[0], self.data.live, numbers, lengths, step[3], step[4])
            return time.perf_counter() - started, drafts
        tokens, ends, _ = self.index.propose_batch(*step)
        seconds = time.perf_counter() - started
        return seconds, [tokens[ends[i] : ends[i + 1]].tolist() for i in range(n)]


class Drafter:
    """SuffixDrafter with Python lists; `budget`: with a budget for steps as a 7B model's on an H100."""

    def __init__(self, data: Workload, budget: bool = False):
        self.data, self.budget = data, budget
        self.drafter = Das(CAP, THRESHOLD).drafter
        if budget:
            self.drafter = SuffixDrafter(DraftConfig(method="das", num_speculative_tokens=CAP))
        load_past(self.drafter.index, data)
        self.names = [str(i) for i in range(len(data.live))]
        for i, name in enumerate(self.names):
            self.drafter.begin(name, i // NUM_SAMPLES, NONE, max_tokens=4096)
        self.drafter.propose(self.names, data.live[:, :LIVE_LENGTH].tolist(), 0)

    def step(self, position: int) -> tuple[float, list[list[int]]]:
        tokens = self.data.live[:, position : position + 1].tolist()
        started = time.perf_counter()
        drafts = self.drafter.propose(self.names, tokens, CAP)
        seconds = time.perf_counter() - started
        if self.budget:
            drafted = sum(map(len, drafts))
            self.drafter.observe_step(8e-3 + 25e-6 * (len(drafts) + drafted), len(drafts), drafted)
        return seconds, drafts


class Arctic:
    """SuffixDecodingCache as vLLM calls it (v1/spec_decode/suffix_decoding.py)."""

    def __init__(self, data: Workload, depth: int):
        from arctic_inference.suffix_decoding import SuffixDecodingCache

        self.data, self.depth = data, depth
        self.cache = SuffixDecodingCache(max_tree_depth=depth, max_cached_requests=10000)
        self.append_s = 0.0
        for problem, rollouts in enumerate(data.past):
            for i, rollout in enumerate(rollouts):
                name = f"past {problem} {i}"
                self.cache.start_request(name, NONE)
                started = time.perf_counter()
                self.cache.add_active_response(name, rollout)
                self.append_s += time.perf_counter() - started
                self.cache.stop_request(name)
        self.past_bytes = self.cache._global_tree.estimate_memory()
        self.names = [str(i) for i in range(len(data.live))]
        for name, row in zip(self.names, data.live, strict=True):
            self.cache.start_request(name, NONE)
            self.cache.add_active_response(name, row[:LIVE_LENGTH].copy())
        trees = [self.cache._global_tree, *self.cache._local_trees.values()]
        self.live_bytes = sum(tree.estimate_memory() for tree in trees) - self.past_bytes

    def step(self, position: int) -> tuple[float, list[list[int]]]:
        tokens, drafts = self.data.live[:, position : position + 1].tolist(), []
        started = time.perf_counter()
        for i, name in enumerate(self.names):
            self.cache.add_active_response(name, tokens[i])
            draft = self.cache.speculate(
                name,
                self.data.live[i, position + 1 - self.depth : position + 1],
                max_spec_tokens=CAP,
                max_spec_factor=1.0,
                min_token_prob=0.1,
            )
            drafts.append(draft.token_ids)
        return time.perf_counter() - started, drafts


@dataclass
class Times:
    """Step times of one contender, seconds [repeats, STEPS], and what it drafted."""

    seconds: np.ndarray
    drafted: float
    accepted: float

    @property
    def p50_ms(self) -> float:
        """Median over the repeats of their medians."""
        return float(np.median(np.median(self.seconds, axis=1))) * 1e3

    @property
    def p95_ms(self) -> float:
        return float(np.percentile(self.seconds, 95)) * 1e3

    @property
    def spread_ms(self) -> tuple[float, float]:
        """Least and largest median of a repeat."""
        medians = np.median(self.seconds, axis=1) * 1e3
        return float(medians.min()), float(medians.max())


def measure(contenders: dict[str, Callable], data: Workload, repeats: int) -> dict[str, Times]:
    """Steps of each contender in turn; all go through the same positions."""
    seconds = {name: np.zeros((repeats, STEPS)) for name in contenders}
    drafted, accepted = dict.fromkeys(contenders, 0), dict.fromkeys(contenders, 0)
    for step in contenders.values():
        for i in range(WARM_UP):
            step(LIVE_LENGTH + i)
    for repeat in range(repeats):
        for name, step in contenders.items():
            for i in range(STEPS):
                position = LIVE_LENGTH + WARM_UP + repeat * STEPS + i
                seconds[name][repeat, i], drafts = step(position)
                drafted[name] += sum(map(len, drafts))
                accepted[name] += data.accepted(drafts, position + 1)
    steps = repeats * STEPS
    return {name: Times(seconds[name], drafted[name] / steps, accepted[name] / steps) for name in contenders}


def random_reads_ms(n: int) -> float:
    """Time to read n random words of 256 MiB, milliseconds."""
    words, rng = np.ones(1 << 25), np.random.default_rng(0)
    times = []
    for _ in range(21):
        where = rng.integers(0, len(words), n)
        started = time.perf_counter()
        words[where]
        times.append(time.perf_counter() - started)
    return float(np.median(times)) * 1e3


def in_child(measure_bytes: Callable[[], float]) -> float:
    """A figure from a forked child, whose memory starts as ours."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, f"{measure_bytes():.6f}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    if not text:
        raise RuntimeError("the child that measures memory failed; its message is above")
    return float(text)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def resident_per_live_token(data: Workload) -> float:
    """Resident bytes per token of live rollouts, without the index over all problems."""
    index = SuffixIndex(max_draft=CAP, cross_tokens=0)
    handles = [index.begin(problem_key(i // NUM_SAMPLES), NONE) for i in range(len(data.live))]
    step = arrays(handles, list(data.live[:, :LIVE_LENGTH]), cap=0)
    before = resident()
    index.propose_batch(*step)
    return (resident() - before) / (len(handles) * LIVE_LENGTH)


def resident_per_arctic_token(data: Workload) -> float:
    """Resident bytes per token of live rollouts in Arctic's trees (local and over all requests), depth 24."""
    from arctic_inference.suffix_decoding import SuffixDecodingCache

    cache = SuffixDecodingCache(max_tree_depth=24, max_cached_requests=10000)
    before = resident()
    for i, row in enumerate(data.live):
        cache.start_request(i, NONE)
        cache.add_active_response(i, row[:LIVE_LENGTH].copy())
    return (resident() - before) / (len(data.live) * LIVE_LENGTH)


def row(name: str, value: float, unit: str, incumbent: float | None = None, bound: float | None = None) -> dict:
    """A result; smaller values are better."""
    ratio = None if incumbent is None else incumbent / value
    return {
        "name": f"suffix.{name}",
        "value": value,
        "unit": unit,
        "incumbent": incumbent,
        "ratio": ratio,
        "bound": bound,
    }


def bench(repeats: int, with_arctic: bool) -> list[dict]:
    data = Workload.make(LIVE_LENGTH + WARM_UP + repeats * STEPS + CAP + 1)
    n = len(data.live)
    live_rss = in_child(lambda: resident_per_live_token(data))
    arctic_rss = in_child(lambda: resident_per_arctic_token(data)) if with_arctic else None
    batch = Batch(data)
    contenders = {
        "propose_512": batch,
        "propose_512_cold": Batch(data, cold=True),
        "rows_512": Batch(data, rows=True),
        "drafter_512": Drafter(data),
        "budget_512": Drafter(data, budget=True),
    }
    live_bytes = batch.index.memory_bytes()["live"] / batch.index.live_tokens()
    arctic = Arctic(data, 24) if with_arctic else None
    if arctic:
        contenders |= {"Arctic, depth 24": arctic, "Arctic, depth 64": Arctic(data, 64)}
    times = measure({name: contender.step for name, contender in contenders.items()}, data, repeats)
    bound = random_reads_ms(n)
    print(f"\n{n} requests a step; one random read per request takes {bound:.3f} ms")
    for name, found in times.items():
        low, high = found.spread_ms
        print(
            f"{name:<18} p50 {found.p50_ms:8.3f} ms ({low:.3f} to {high:.3f} in {repeats} repeats)  "
            f"p95 {found.p95_ms:8.3f} ms  drafted {found.drafted:6.0f}  accepted {found.accepted:6.0f} a step"
        )
    rows, incumbent = [], times.get("Arctic, depth 24")
    for name, found in times.items():
        if not name.startswith("Arctic"):
            rows.append(row(f"{name}.p50_ms", found.p50_ms, "ms", incumbent and incumbent.p50_ms, bound))
            rows.append(row(f"{name}.p95_ms", found.p95_ms, "ms", incumbent and incumbent.p95_ms, bound))
    tokens = data.past_tokens
    segment = batch.index.segments()[0]
    return [
        *rows,
        row(
            "append_us_per_token",
            batch.append_s / tokens * 1e6,
            "us",
            arctic and arctic.append_s / tokens * 1e6,
            bound / n * 1e3,
        ),
        row("live_bytes_per_token", live_bytes, "B", arctic and arctic.live_bytes / (n * LIVE_LENGTH), 4),
        row("live_resident_bytes_per_token", live_rss, "B", arctic_rss, 4),
        row(
            "closed_bytes_per_token",
            segment["num_bytes"] / segment["num_tokens"],
            "B",
            arctic and arctic.past_bytes / tokens,
            4,
        ),
        row("close_us_per_token", batch.close_s / tokens * 1e6, "us"),
        row("open_ms", open_ms(batch.index, repeats), "ms", arctic and arctic.append_s * 1e3),
    ]


def open_ms(index: SuffixIndex, repeats: int) -> float:
    """Time to read and check the closed epoch's file, milliseconds; it is in the page cache."""
    times = []
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "segment")
        index.write_segment(0, path)
        for _ in range(repeats):
            fresh = SuffixIndex(max_draft=CAP)
            started = time.perf_counter()
            fresh.open_segment(path)
            times.append(time.perf_counter() - started)
    return float(np.median(times)) * 1e3


def begin(doc: str) -> argparse.Namespace:
    """Read the options, pin the process to one core and say where it runs."""
    parser = argparse.ArgumentParser(
        description=doc.splitlines()[0], epilog="Tests of the index: scripts/test.sh tests/draft."
    )
    parser.add_argument("--repeats", type=int, default=5, help="at least 5")
    parser.add_argument("--json", type=Path, help="write the results as a list of {name, value, unit, ...}")
    options = parser.parse_args()
    if options.repeats < 5:
        parser.error("--repeats must be at least 5")
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    print(f"{' '.join(sys.argv)}\n{machine.describe()}\n{versions.report()}\npinned to core {core}")
    return options


def report(rows: list[dict], path: Path | None) -> None:
    print()
    for found in rows:
        against = f"against {found['incumbent']:10.4f}  {found['ratio']:8.2f}x" if found["ratio"] else ""
        print(f"{found['name']:<40} {found['value']:10.4f} {found['unit']:<3} {against}")
    if path:
        path.write_text(json.dumps(rows, indent=1) + "\n")


def main() -> None:
    options = begin(__doc__)
    with_arctic = importlib.util.find_spec("arctic_inference") is not None
    if not with_arctic:
        print("Arctic Inference is not installed (scripts/install_arctic.sh does it): nothing to compare with")
    report(bench(options.repeats, with_arctic), options.json)


if __name__ == "__main__":
    main()
