"""The drafter with one more source of candidates: history where it knows the text, a draft model elsewhere.

For each request the source that promises the larger gain drafts. The gain of a draft token is what the planner counts
in (`kernels/suffix/api.py`: path probability / min_path_prob - 1, in units of a draft token's cost), so sources are
compared by accepted tokens against cost, and drafting nothing is one of the answers. The model costs time before it
promises anything: it is asked where that has been worth it lately, for batches of this size and by what it kept of its
promises, and tried again every `RETRY_EVERY` steps elsewhere.

Source: ours. Cost: the source's own, and about 50 us a step.

Shape suffixes: N requests, K draft tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from rl_accel.draft.config import HISTORY_METHODS, DraftConfig
from rl_accel.draft.drafter import SuffixDrafter

MIN_PROBABILITY = 0.01
"""As in `budget.py`: estimates of path probabilities mean little below."""
FIRST_CALLS, RETRY_EVERY = 8, 64
"""Calls for a batch size before its value is believed, and steps between two tries where it is negative."""
VALUE_RATE, GAIN_RATE = 0.1, 0.01
FIRST_PROBE, MAX_PROBES, PROBE_ROWS, PROBE_TOKENS = 32, 64, 8, 4
"""Steps before drafts are made only to learn what they cost, where nobody has a better one; how often that is done, and
for how many requests and tokens at most."""
GOOD, GOOD_DEPTH = 0.75, 8
"""Probability of a token of a source that has learned, and its longest draft, when it is asked what it could bring."""


class CandidateSource(Protocol):
    """Something else than history that proposes draft tokens."""

    name: str
    """In the counts of sources."""

    @property
    def ready(self) -> bool:
        """Whether it has something to say at all."""

    @property
    def present(self) -> bool:
        """Whether it could draft, however badly."""

    def candidates(
        self,
        rows_N: npt.NDArray[np.uint32],
        num_tokens_N: npt.NDArray[np.uint32],
        token_ids: npt.NDArray[np.int32],
        max_draft_tokens_N: npt.NDArray[np.uint32],
        min_path_probs_N: npt.NDArray[np.float32],
        min_step_gain: float,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return draft tokens and path probabilities, both [N, K], K at most the largest of `max_draft_tokens_N`.
        Where it has no token the probability is 0.

        Args:
            rows_N: rows of the engine's batch, which `token_ids` has as well.
            num_tokens_N: tokens of each row, the last one sampled just now.
            min_step_gain: a further token for all rows is not worth its cost where it gains less than this.
        """

    def observe(
        self,
        paths_RK: npt.NDArray[np.float32],
        lengths_R: npt.NDArray[np.int64],
        num_accepted_R: npt.NDArray[np.int64],
    ) -> None:
        """Hear what became of R of its drafts: promised path probabilities, tokens (at most K), accepted ones."""

    def chain_seconds(self, num_rows: int) -> float:
        """Return the seconds that it takes for a draft token of each of so many rows."""

    def observe_step(
        self, seconds: float, predicted: float, fixed: float, saved: float, potential: float | None
    ) -> None:
        """Hear of a step.

        Args:
            seconds: how long it took.
            predicted, fixed: how long it was expected to take, and what of that does not depend on how many requests
                and tokens there were (0: unknown).
            saved: seconds that the source's drafts saved.
            potential: seconds that it would have been shorter for the same tokens, had a source drafted that is right
                with `GOOD` a token; negative where history does better. None: unknown.
        """


class _Value:
    """What asking the source brought lately, in seconds a call, by batch size in powers of two."""

    def __init__(self) -> None:
        self._values: dict[int, tuple[int, float]] = {}
        self._idle_calls = 0

    def asks(self, num_rows: int) -> bool:
        calls, value = self._values.get(num_rows.bit_length(), (0, 0.0))
        if calls < FIRST_CALLS or value > 0.0:
            self._idle_calls = 0
            return True
        self._idle_calls += 1
        return self._idle_calls % RETRY_EVERY == 0

    def observe(self, num_rows: int, seconds: float) -> None:
        calls, value = self._values.get(num_rows.bit_length(), (0, 0.0))
        rate = max(VALUE_RATE, 1.0 / (calls + 1))
        self._values[num_rows.bit_length()] = calls + 1, value + rate * (seconds - value)


class _Promise(NamedTuple):
    """A draft of the source. Gains are in units of a draft token's cost."""

    num_tokens: int
    paths_K: npt.NDArray[np.float32]
    floor: float
    """Path probability from which on a token is worth its cost."""
    gain: float
    history_gain: float


class CombinedDrafter(SuffixDrafter):
    """History and one more source. `head`, `ahead`: the source alone."""

    def __init__(self, config: DraftConfig, source: CandidateSource, **kwargs: Any):
        super().__init__(config, **kwargs)
        self.source = source
        self.uses_history = config.method in HISTORY_METHODS
        self._value = _Value()
        self._alone, self._num_gained = False, 0
        self._num_probes, self._to_probe = 0, FIRST_PROBE
        self._step_s = 0.0  # of the source, a draft token for all its rows
        self._last: dict[int, _Promise] = {}
        """By slot, the last drafts of the source."""
        self._promised_gain = self._kept_gain = 0.0
        self.last_source_s = 0.0
        self._served = np.zeros(3)
        self._saved_s = 0.0

    def propose_rows(
        self,
        request_ids: Sequence[str],
        token_ids: npt.NDArray[np.int32],
        rows: npt.NDArray[np.uint32],
        num_tokens: npt.NDArray[np.uint32],
    ) -> list[list[int]]:
        """As `SuffixDrafter.propose_rows`."""
        self.last_source_s = 0.0
        if not len(request_ids):
            return []
        drafts = self._propose(request_ids, token_ids, rows, num_tokens)
        if self._may_probe() and not any(drafts):
            self._probe_into(drafts, self._slots_of(request_ids), token_ids, rows, num_tokens)
        return drafts

    def _may_probe(self) -> bool:
        """Count a step; return whether the cost of a draft token is not known yet, and it may draft to learn it."""
        self._to_probe -= 1
        wanted = self._to_probe < 0 and self.planner.timed and not self.planner.cost_is_known
        return wanted and self._num_probes < MAX_PROBES and self.source.present

    def _probe_into(self, drafts: list[list[int]], slots: Any, token_ids: Any, rows: Any, num_tokens: Any) -> None:
        """Let the source draft a few tokens, of which it may know nothing, to learn what they cost."""
        length = 1 + self._num_probes % PROBE_TOKENS
        probed = np.flatnonzero(self._limits[slots] - self._generated[slots] > PROBE_TOKENS)[:PROBE_ROWS]
        if len(probed):
            self._num_probes, self._to_probe = self._num_probes + 1, 1
            limits_N, floors_N = np.full(len(probed), length, np.uint32), np.zeros(len(probed), np.float32)
            started = time.perf_counter()
            tokens_NK, paths_NK = self.source.candidates(
                rows[probed], num_tokens[probed], token_ids, limits_N, floors_N, 0.0
            )
            lengths_N = (paths_NK > 0.0).sum(1).clip(max=length)
            self.last_source_s += time.perf_counter() - started
            for i, draft, found in zip(probed, tokens_NK.tolist(), lengths_N.tolist(), strict=True):
                drafts[i] = self._until_stop(draft[:found])

    def _propose(
        self,
        request_ids: Sequence[str],
        token_ids: npt.NDArray[np.int32],
        rows: npt.NDArray[np.uint32],
        num_tokens: npt.NDArray[np.uint32],
    ) -> list[list[int]]:
        slots = self._slots_of(request_ids)
        generated = num_tokens - self._prompt_lengths[slots]
        gained = generated - self._generated[slots]
        self._num_gained = int(gained.sum())
        self._observe_accepted(slots, gained)
        self._generated[slots] = generated
        fixed = self.config.policy == "fixed"
        asks = self.source.ready and (fixed or self._value.asks(len(slots)))
        if self._use_history_alone(self.uses_history and not asks):
            return super().propose_rows(request_ids, token_ids, rows, num_tokens)
        max_draft_N, min_probs_N = self._limits_of(slots)
        break_even = self.planner.next_break_even_gain()
        silent = math.isinf(break_even)
        drafts, paths = self._from_history(slots, token_ids, rows, num_tokens, max_draft_N, min_probs_N, silent)
        floor_N = np.maximum(min_probs_N, MIN_PROBABILITY)
        gains_N = np.array([(path / floor_N[i] - 1.0).sum() for i, path in enumerate(paths)])
        expected_N = np.array([path.sum() for path in paths])
        first_N = np.array([path[0] if len(path) else 0.0 for path in paths])
        history_N = gains_N.copy()
        promised: dict[int, npt.NDArray[np.float32]] = {}
        if not silent and asks:
            asked = np.flatnonzero(max_draft_N > 0)
            if len(asked):
                promised = self._ask_source(
                    asked,
                    drafts,
                    (gains_N, expected_N, first_N),
                    token_ids,
                    rows,
                    num_tokens,
                    max_draft_N,
                    floor_N,
                )
        self.planner.observe_candidates(len(slots), float(first_N.sum()), float(expected_N.sum()))
        if silent or gains_N.sum() < break_even:
            return [[] for _ in request_ids]
        self._last = {
            int(slots[i]): _Promise(len(drafts[i]), path, float(floor_N[i]), float(gains_N[i]), float(history_N[i]))
            for i, path in promised.items()
        }
        return drafts

    def _use_history_alone(self, alone: bool) -> bool:
        """History by itself drafts in one call; what the index counts is the planner's then."""
        if alone != self._alone:
            self.collect()
            self._alone = alone
        return alone

    def _from_history(
        self, slots: Any, token_ids: Any, rows: Any, num_tokens: Any, max_draft_N: Any, min_probs_N: Any, silent: bool
    ) -> tuple[list[list[int]], list[npt.NDArray[np.float32]]]:
        nothing: tuple[list[list[int]], list[npt.NDArray[np.float32]]] = (
            [[] for _ in slots], [np.zeros(0, np.float32) for _ in slots],
        )  # fmt: skip
        if not self.uses_history:
            return nothing
        if self._backs_off():
            self._take_last_tokens(slots, token_ids, rows, num_tokens)
            return nothing
        limits = np.zeros_like(max_draft_N) if silent else max_draft_N
        drafts, paths = self.index.candidates_of_rows(
            self._handles[slots], token_ids, rows, num_tokens, limits, min_probs_N, self.capture_sizes
        )
        if not silent:
            self._idle_calls = 0 if any(drafts) else self._idle_calls + 1
        ends = np.cumsum([len(draft) for draft in drafts])
        return drafts, np.split(paths, ends[:-1])

    def _ask_source(
        self,
        asked: npt.NDArray[np.int64],
        drafts: list[list[int]],
        found: tuple[npt.NDArray, npt.NDArray, npt.NDArray],
        token_ids: Any,
        rows: Any,
        num_tokens: Any,
        max_draft_N: Any,
        floor_N: Any,
    ) -> dict[int, npt.NDArray[np.float32]]:
        """Let the source draft where it gains more than history; changes `drafts` and `found` in place.

        Returns:
            Index of a request that it drafts for -> path probabilities.
        """
        gains_N, expected_N, first_N = found
        started, per_draft_s = time.perf_counter(), self.planner.cost.per_draft_s
        counts = per_draft_s > 0.0 and self.config.policy != "fixed"
        min_step_gain = self._step_s / per_draft_s if counts else 0.0
        tokens_NK, paths_NK = self.source.candidates(
            rows[asked], num_tokens[asked], token_ids, max_draft_N[asked], floor_N[asked], min_step_gain
        )
        kept_NK = paths_NK >= floor_N[asked, None]
        kept_NK &= np.arange(tokens_NK.shape[1]) < max_draft_N[asked, None]
        source_gain = np.where(kept_NK, paths_NK / floor_N[asked, None] - 1.0, 0.0).sum(1)
        better = source_gain > gains_N[asked]
        lengths = kept_NK.sum(1)
        brought = float((source_gain - gains_N[asked])[better].sum())
        expected = (paths_NK * kept_NK).sum(1)
        for k in np.flatnonzero(better):
            i = asked[k]
            drafts[i] = self._until_stop(tokens_NK[k, : lengths[k]].tolist())
        where = asked[better]
        gains_N[where], expected_N[where] = source_gain[better], expected[better]
        first_N[where] = paths_NK[better, 0]
        self.last_source_s = time.perf_counter() - started
        step_s = self.last_source_s / tokens_NK.shape[1]
        self._step_s += VALUE_RATE * (step_s - self._step_s) if self._step_s else step_s
        if per_draft_s > 0.0 and self.planner.knows_costs:
            self._value.observe(len(max_draft_N), brought * self.kept_share * per_draft_s - self.last_source_s)
        return {int(asked[k]): paths_NK[k] for k in np.flatnonzero(better)}

    def _until_stop(self, draft: list[int]) -> list[int]:
        for i, token in enumerate(draft):
            if token in self._stop_set:
                return draft[: i + 1]
        return draft

    def _observe_accepted(self, slots: Any, gained: Any) -> None:
        """See what became of the source's last drafts."""
        if not self._last:
            return
        last, self._last = self._last, {}
        seen = [(last[int(slot)], int(n)) for slot, n in zip(slots, gained, strict=True) if int(slot) in last]
        if not seen:
            return
        lengths_R = np.array([promise.num_tokens for promise, _ in seen])
        accepted_R = np.minimum(np.maximum([n - 1 for _, n in seen], 0), lengths_R)
        self._served += (len(seen), lengths_R.sum(), accepted_R.sum())
        self.source.observe(np.stack([promise.paths_K for promise, _ in seen]), lengths_R, accepted_R)
        # What history would have gained is no merit of the source.
        without = sum(promise.history_gain for promise, _ in seen)
        floors_R = np.array([promise.floor for promise, _ in seen])
        kept = float((accepted_R / floors_R - lengths_R).sum()) - without
        self._saved_s += kept * self.planner.cost.per_draft_s
        self._kept_gain += GAIN_RATE * (kept - self._kept_gain)
        self._promised_gain += GAIN_RATE * (sum(p.gain for p, _ in seen) - without - self._promised_gain)

    @property
    def kept_share(self) -> float:
        """Of what the source promised beyond history lately, that it kept."""
        return self._kept_gain / self._promised_gain if self._promised_gain > 0.0 else 1.0

    def observe_step(self, seconds: float, num_requests: int, num_draft_tokens: int) -> None:
        """As `SuffixDrafter.observe_step`; the time of the source is no part of what a draft token costs."""
        model_s = seconds - self.last_source_s
        if model_s > 0.0:
            cost = self.planner.cost
            known = self.planner.cost_is_known
            predicted = cost.predict(num_requests, num_draft_tokens) if known else 0.0
            fixed = cost.predict(0, num_draft_tokens > 0) if known else 0.0
            potential = self._potential(num_requests, num_draft_tokens)
            self.source.observe_step(model_s, predicted, fixed, self._saved_s - self.last_source_s, potential)
            self._saved_s = 0.0
            super().observe_step(model_s, num_requests, num_draft_tokens)

    def _potential(self, num_requests: int, num_draft_tokens: int) -> float | None:
        """As `CandidateSource.observe_step`, by the tokens of the step before."""
        cost, chain_s = self.planner.cost, self.source.chain_seconds(num_requests)
        if not cost.knows_base or not self._num_gained:
            return None
        token_s, right, expected = cost.predict(num_requests, 0) / num_requests, 1.0, 0.0
        for k in range(1, min(self.max_draft, GOOD_DEPTH) + 1):
            right *= GOOD
            expected += right
            step_s = cost.predict(num_requests, k * num_requests) + k * chain_s
            token_s = min(token_s, step_s / (num_requests * (1.0 + expected)))
        return cost.predict(num_requests, num_draft_tokens) + self.last_source_s - self._num_gained * token_s

    def _observe_candidates(self, stats: dict[str, Any]) -> None:
        """What history would do alone says little where the source was asked; `propose_rows` reports what is."""
        if self._alone:
            super()._observe_candidates(stats)

    def take_source_stats(self) -> dict[tuple[str, str], npt.NDArray[np.int64]]:
        """As `SuffixDrafter.take_source_stats`, with what this source drafted."""
        found = super().take_source_stats()
        served, self._served = self._served, np.zeros(3)
        return {**found, (self.source.name, "0"): served.astype(np.int64)}
