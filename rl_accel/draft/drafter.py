"""The drafter: request names and prompts in, drafts out; knows problems, epochs, budgets and its own history.

    drafter = SuffixDrafter(DraftConfig())
    drafter.begin("r1", "problem 7", prompt_token_ids)
    drafts = drafter.propose(["r1"], [[first_token]], max_draft_tokens=8)
    ...                                      # in each call: the accepted tokens and the one that the target added
    drafter.end("r1")
    drafter.close_epoch(epoch=0)

The index finds likely continuations (`kernels/suffix`), the planner decides how many are worth it (`planner.py`).
Without `observe_step` costs are unknown and drafts are as long as allowed. Not thread-safe. Host: `hosts/proposer.py`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_accel.draft import history
from rl_accel.draft.config import DraftConfig
from rl_accel.draft.lengths import BYTES_PER_PROBLEM, MAX_PROBLEMS
from rl_accel.draft.planner import PLAN_EVERY, Planner
from rl_accel.errors import DraftError
from rl_accel.kernels.suffix.api import (
    MATCH_LENGTHS,
    MAX_DRAFT,
    NO_CAPTURE_SIZES,
    SOURCES,
    UNBOUNDED,
    SuffixIndex,
    problem_key,
)

NO_LIMIT = 1 << 30
CROSS_TOKENS = 1 << 18
LENGTHS_SHARE = 1 / 16
"""Of the memory for history, at most: response lengths by problem. The index keeps to the rest by itself."""
GIVEN_UP = ("problems_renewed", "requests_let_go", "segments_dropped", "rollouts_lost")
"""Counters of what the index had no memory for, see `kernels/suffix/csrc/budget.cpp`."""
FALLING = 0.85
"""Of the last epoch's probability that a first token is accepted; below it the window is halved."""
BACK_OFF_AFTER, BACK_OFF_CALLS, RESUME_CALLS = 16, 8, 4
"""See `propose_rows`."""
MIN_STEPS = 64
"""Requests times steps of an epoch that say something about acceptance."""


class SuffixDrafter:
    """Drafts from earlier rollouts of the same problem, from siblings, prompt, own text, and other problems.

    Args:
        config: `max_draft`, `policy`, `window`, `history_gib`, `cross_problems` are used.
        tokenizer: fingerprint (64 bit) of the tokenizer; a snapshot of another one is refused.
        stop_token_ids: end-of-text tokens, behind which nothing is drafted.
        seed: of the planner's length scenarios.
    """

    def __init__(
        self,
        config: DraftConfig | None = None,
        *,
        tokenizer: int = 0,
        stop_token_ids: Sequence[int] = (),
        seed: int = 0,
    ):
        self.config = config or DraftConfig(method="das")
        self.tokenizer = tokenizer
        self.max_draft = self.config.num_speculative_tokens or MAX_DRAFT
        if self.config.enabled:
            self.max_draft = self.config.max_draft
        limit = int(min(self.config.history_gib * 2**30, UNBOUNDED))
        max_problems = min(max(int(LENGTHS_SHARE * limit) // BYTES_PER_PROBLEM, 1), MAX_PROBLEMS)
        self.index = SuffixIndex(
            tokenizer=tokenizer,
            max_draft=self.max_draft,
            stop_token_ids=stop_token_ids,
            cross_tokens=CROSS_TOKENS if self.config.cross_problems else 0,
            max_bytes=max(limit - max_problems * BYTES_PER_PROBLEM, 1),
        )
        self.planner = Planner(self.config.policy, self.max_draft, seed, max_problems)
        self.epoch = 0
        self.window = self.config.window
        self.capture_sizes: npt.NDArray[np.uint32] = NO_CAPTURE_SIZES
        """Sizes (requests + draft tokens) that a step should fill, ascending, for CUDA graphs; the last is a limit."""
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._handles = np.zeros(0, np.int64)
        self._problems = np.zeros(0, np.int64)
        self._prompt_lengths = np.zeros(0, np.int64)
        self._generated = np.zeros(0, np.int64)
        self._limits = np.zeros(0, np.int64)
        self._max_draft_tokens = np.zeros(0, np.uint32)
        self._min_path_probs = np.zeros(0, np.float32)
        self._steps_since_plan, self._min_steps, self._planned_for = 0, 0, 0
        self._usual_min_path_prob = 0.0
        self._idle_calls, self._calls_left_out = 0, 0
        self._stop_tokens = np.array(stop_token_ids, np.int32)
        self._stop_set = frozenset(stop_token_ids)
        self._expected, self._steps = 0.0, 0
        self._last_rate = 0.0
        self._by_source: dict[tuple[str, str], npt.NDArray[np.int64]] = {}
        self._given_up = dict.fromkeys(GIVEN_UP, 0)
        self._files: dict[int, str] = {}  # of segments that were read or saved, by checksum

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._slots

    def num_generated(self, request_id: str) -> int:
        """Return how many response tokens of a live request were taken."""
        return int(self._generated[int(self._slots_of([request_id])[0])])

    def begin(
        self,
        request_id: str,
        problem: str | int,
        prompt_token_ids: Sequence[int] | npt.NDArray[np.int32],
        max_tokens: int = NO_LIMIT,
    ) -> None:
        """Start a request.

        Args:
            request_id: unique among live requests.
            problem: what its siblings and earlier epochs share, e.g. the data set's row.
            prompt_token_ids: int [P].
            max_tokens: longest response, in tokens; the length forecast does not go beyond.

        Raises:
            DraftError: if the request is live already, or a token is negative.
        """
        if request_id in self._slots:
            raise DraftError(f"request {request_id!r} has begun already")
        key = problem_key(problem)
        handle = self.index.begin(key, prompt_token_ids)
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self._slots[request_id] = slot
        self._handles[slot], self._problems[slot] = handle, key
        self._prompt_lengths[slot], self._generated[slot] = len(prompt_token_ids), 0
        self._limits[slot] = min(max_tokens, NO_LIMIT)
        self._max_draft_tokens[slot] = min(self.max_draft, max(max_tokens, 0))
        self._min_path_probs[slot] = self._usual_min_path_prob
        self._idle_calls = min(self._idle_calls, BACK_OFF_AFTER - RESUME_CALLS)

    def propose(
        self,
        request_ids: Sequence[str],
        new_token_ids: Sequence[Sequence[int]],
        max_draft_tokens: int | Sequence[int],
    ) -> list[list[int]]:
        """Take the tokens that each request has gained since the last call, then draft.

        Args:
            request_ids: live requests, each once.
            new_token_ids: per request: the accepted draft tokens and the one that the target added.
            max_draft_tokens: longest draft, one for all or one per request; 0 only appends.

        Returns:
            A draft per request, maybe empty.

        Raises:
            DraftError: on an unknown request, lists of different lengths or a negative token; nothing is taken then.
        """
        slots = self._slots_of(request_ids)
        n = len(slots)
        if len(new_token_ids) != n:
            raise DraftError(f"{n} requests, but {len(new_token_ids)} lists of new tokens")
        wanted = np.asarray(max_draft_tokens, np.int64)
        if wanted.shape not in ((), (n,)):
            raise DraftError(f"{n} requests, but {wanted.size} draft lengths")
        if n == 0:
            return []
        lengths = np.fromiter(map(len, new_token_ids), np.int64, n)
        offsets = np.zeros(n + 1, np.uint32)
        np.cumsum(lengths, out=offsets[1:])
        tokens = np.fromiter((t for row in new_token_ids for t in row), np.int32, int(lengths.sum()))
        if tokens.min(initial=0) < 0:
            raise DraftError(f"token ids must not be negative; got {tokens.min()}")
        self._generated[slots] += lengths
        allowed, min_path_probs = self._limits_of(slots)
        drafts, ends, _ = self.index.propose_batch(
            self._handles[slots],
            tokens,
            offsets,
            np.minimum(allowed, np.maximum(wanted, 0)).astype(np.uint32),
            min_path_probs,
            self.capture_sizes,
            self.planner.next_break_even_gain(),
        )
        return [drafts[ends[i] : ends[i + 1]].tolist() for i in range(n)]

    def propose_rows(
        self,
        request_ids: Sequence[str],
        token_ids: npt.NDArray[np.int32],
        rows: npt.NDArray[np.uint32],
        num_tokens: npt.NDArray[np.uint32],
    ) -> list[list[int]]:
        """`propose` for a host that keeps each request's text (prompt first) in a row of `token_ids`.

        Once nothing was worth drafting for `BACK_OFF_AFTER` calls, the index is asked in one call of `BACK_OFF_CALLS`
        only, which takes the tokens of all of them, until something is drafted. After a new request it is asked
        `RESUME_CALLS` times in a row.
        """
        if not len(request_ids):
            return []
        slots = self._slots_of(request_ids)
        self._generated[slots] = num_tokens - self._prompt_lengths[slots]
        if self._backs_off():
            self._steps_since_plan += 1
            self._take_last_tokens(slots, token_ids, rows, num_tokens)
            return [[] for _ in request_ids]
        max_draft_tokens, min_path_probs = self._limits_of(slots)
        drafts = self.index.propose_rows(
            self._handles[slots],
            token_ids,
            rows,
            num_tokens,
            max_draft_tokens,
            min_path_probs,
            self.capture_sizes,
            self.planner.next_break_even_gain(),
        )
        self._idle_calls = 0 if any(drafts) else self._idle_calls + 1
        return drafts

    def _backs_off(self) -> bool:
        if self._idle_calls < BACK_OFF_AFTER:
            return False
        self._calls_left_out = (self._calls_left_out + 1) % BACK_OFF_CALLS
        return self._calls_left_out > 0

    def _take_last_tokens(self, slots: Any, token_ids: Any, rows: Any, num_tokens: Any) -> None:
        """Take the text of requests that end with this step: there is no later call that could."""
        ends = self._generated[slots] >= self._limits[slots]
        ends |= np.isin(token_ids[rows, num_tokens - 1], self._stop_tokens)
        if ends.any():
            n = int(ends.sum())
            max_draft_tokens, min_path_probs = np.zeros(n, np.uint32), np.zeros(n, np.float32)
            self.index.propose_rows(
                self._handles[slots[ends]], token_ids, rows[ends], num_tokens[ends], max_draft_tokens, min_path_probs
            )

    def observe_step(self, seconds: float, num_requests: int, num_draft_tokens: int) -> None:
        """Report the wall time of one step without prefills; from then on drafts have a known cost."""
        self.planner.observe_step(seconds, num_requests, num_draft_tokens)

    def end(self, request_id: str, keep: bool = True) -> None:
        """End a request. With `keep` its response enters the history.

        Raises:
            DraftError: if the request is not live.
        """
        slot = int(self._slots_of([request_id])[0])
        del self._slots[request_id]
        self.index.end(int(self._handles[slot]), keep)
        if keep and self._generated[slot] > 0:
            self.planner.lengths.observe(int(self._problems[slot]), int(self._generated[slot]))
        self._free.append(slot)

    def close_epoch(self, epoch: int, policy_version: int = 0) -> dict[str, int]:
        """Close an epoch: pack what ended, shrink or widen the window, forget what is beyond it."""
        self.collect()
        info = self.index.close_epoch(epoch, policy_version)
        self._adapt_window()
        self.epoch = max(self.epoch, epoch + 1)
        self.drop_before(self.epoch - self.window)
        self.index.begin_epoch(self.epoch)
        return info

    def _adapt_window(self) -> None:
        """Halve the window when first tokens are predicted worse than in the epoch before, else let it grow.

        A first token's probability does not depend on what drafts cost, so pricing does not look like forgetting.
        """
        if self._steps >= MIN_STEPS:
            rate = self._expected / self._steps
            if rate < FALLING * self._last_rate:
                self.window = max(1, self.window // 2)
            elif rate >= self._last_rate:
                self.window = min(self.config.window, self.window + 1)
            self._last_rate = rate
        self._expected, self._steps = 0.0, 0

    def drop_before(self, epoch: int) -> None:
        """Forget closed epochs before this one."""
        self.index.drop_before(epoch)

    def memory_bytes(self) -> dict[str, int]:
        """Return bytes of the `live` and the `closed` tier, the index over all problems (`cross`), and `lengths`.

        Together they stay within `history_gib`, and 2 KB for each request that ran at once.
        """
        return {**self.index.memory_bytes(), "lengths": self.planner.lengths.memory_bytes()}

    def collect(self) -> dict[str, Any]:
        """Take the index's counters into account; returns them (see `SuffixIndex.take_stats`)."""
        stats = self.index.take_stats()
        self._observe_candidates(stats)
        self._expected += stats["expected_first"]
        self._steps += stats["request_steps"]
        for source, length, drafts, drafted, accepted in stats["by_source"]:
            key = (SOURCES[source], MATCH_LENGTHS[length])
            self._by_source[key] = self._by_source.get(key, 0) + np.array([drafts, drafted, accepted])
        for name in GIVEN_UP:
            self._given_up[name] += stats[name]
        return stats

    def _observe_candidates(self, stats: dict[str, Any]) -> None:
        self.planner.observe_candidates(stats["request_steps"], stats["expected_first"], stats["expected_all"])

    def take_given_up(self) -> dict[str, int]:
        """Return and reset how often memory was short, by `GIVEN_UP`."""
        self.collect()
        found, self._given_up = self._given_up, dict.fromkeys(GIVEN_UP, 0)
        return found

    def take_source_stats(self) -> dict[tuple[str, str], npt.NDArray[np.int64]]:
        """Return and reset (source, match length) of a draft's first token -> int64 [drafts, drafted, accepted]."""
        self.collect()
        found, self._by_source = self._by_source, {}
        return found

    def save(self, path: str | os.PathLike) -> None:
        """Write a snapshot to a folder: closed epochs, finished rollouts of the running one, what was learned.

        Segments that an earlier snapshot on the same file system holds are linked, not written again.

        Raises:
            DraftError: if it cannot be written; a snapshot that was there before is there still.
        """
        self.collect()
        self.index.pack()
        planner = self.planner.state_dict()
        lengths = planner.pop("lengths")
        manifest = {"tokenizer": self.tokenizer, "epoch": self.epoch, "window": self.window, "planner": planner}
        self._files = history.save_snapshot(path, self.index, manifest, lengths, self._files)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        config: DraftConfig | None = None,
        *,
        tokenizer: int = 0,
        stop_token_ids: Sequence[int] = (),
        seed: int = 0,
    ) -> SuffixDrafter:
        """Return a drafter with the history of a snapshot, as `restore` takes it."""
        drafter = cls(config, tokenizer=tokenizer, stop_token_ids=stop_token_ids, seed=seed)
        drafter.restore(path)
        return drafter

    def restore(self, path: str | os.PathLike) -> None:
        """Take the history of a snapshot into a drafter that is new.

        Raises:
            DraftError: if the snapshot is missing, truncated, damaged, or of another tokenizer; the drafter is of no
                use then.
        """
        manifest = history.read_manifest(path, self.tokenizer)
        lengths = history.load_learned(path, self.index)
        self.planner.load_state_dict({**manifest["planner"], "lengths": lengths})
        self._files = history.load_segments(path, self.index, manifest)
        self.epoch = manifest["epoch"]
        self.window = min(max(manifest["window"], 1), self.config.window)
        self.drop_before(self.epoch - self.window)
        self.index.begin_epoch(self.epoch)

    def _slots_of(self, request_ids: Sequence[str]) -> npt.NDArray[np.int64]:
        try:
            return np.fromiter(map(self._slots.__getitem__, request_ids), np.int64, len(request_ids))
        except KeyError as error:
            raise DraftError(f"request {error.args[0]!r} has not begun") from None

    def _limits_of(self, slots: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float32]]:
        """Plan anew now and then, and when the batch changed; return the limits of these requests."""
        self._steps_since_plan += 1
        num_live = len(self._slots)
        changed = not 0.9 <= num_live / max(self._planned_for, 1) <= 1.1
        wait = self._min_steps if changed else max(PLAN_EVERY, self._min_steps)
        if self._steps_since_plan > wait or self.planner.probed:
            self.collect()
            live = np.fromiter(self._slots.values(), np.int64, num_live)
            self._max_draft_tokens[live], self._min_path_probs[live] = self.planner.plan(
                self._problems[live], self._generated[live], np.maximum(self._limits[live] - self._generated[live], 1)
            )
            self._steps_since_plan, self._planned_for = 0, num_live
            self._min_steps = self.planner.min_steps(num_live)
            self._usual_min_path_prob = float(np.median(self._min_path_probs[live]))
        # A draft that fills the limit leaves no position for the token that the target adds.
        remaining = np.maximum(np.minimum(self._limits[slots] - self._generated[slots] - 1, MAX_DRAFT), 0)
        return np.minimum(self._max_draft_tokens[slots], remaining.astype(np.uint32)), self._min_path_probs[slots]

    def _grow(self) -> None:
        size = len(self._handles)
        more = max(64, size)
        for name in (
            "_handles",
            "_problems",
            "_prompt_lengths",
            "_generated",
            "_limits",
            "_max_draft_tokens",
            "_min_path_probs",
        ):
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.zeros(more, old.dtype)]))
        self._free.extend(range(size + more - 1, size - 1, -1))
