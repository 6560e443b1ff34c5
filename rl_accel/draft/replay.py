"""Replays recorded rollouts without a model: what would a drafter have drafted, and how much would have been accepted?

Sampling does not depend on the drafter, so a recorded rollout is what the target would have sampled. Rollouts of one
(epoch, step) run in lock step, as an engine runs them: in every step each live request's draft is compared with its
recorded continuation; the right beginning is accepted and one token of the target's own follows.

    result = replay(read_rollouts("rollouts.jsonl"), Das(max_draft=8))
    result.total.accepted_per_request_step

Drafters: `Das` (this package), `Ngram` (the drafts of vLLM 0.28's `ngram`), `Arctic` (vLLM 0.28's `suffix`; needs the
package arctic-inference). Leaves out: prefills of several steps, preemption, and the cut at the model's longest text.
Cost: the drafters' own time and about 2 us per request and step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rl_accel.draft.config import DraftConfig
from rl_accel.draft.drafter import SuffixDrafter
from rl_accel.draft.planner import Planner
from rl_accel.draft.record import Rollout
from rl_accel.errors import DraftError, NotLiveError


class ReplayDrafter(Protocol):
    """What `replay` asks of a drafter."""

    def begin(self, name: str, problem: str, prompt_token_ids: Sequence[int]) -> None:
        """Start a request."""

    def propose(self, names: Sequence[str], new_token_ids: Sequence[Sequence[int]]) -> list[list[int]]:
        """Take what these requests gained, return a draft for each."""

    def end(self, name: str) -> None:
        """End a request; all its tokens were seen."""

    def end_epoch(self, epoch: int) -> None:
        """All rollouts of an epoch have ended."""

    def memory_bytes(self) -> int:
        """Return the memory in use."""


@dataclass
class Counts:
    """What happened in one epoch, or in all."""

    engine_steps: int = 0
    """Steps of the engine, each with all live requests."""
    request_steps: int = 0
    """Sum of the requests in them. The step that only reads a prompt is not counted: nothing can be drafted for it."""
    drafted: int = 0
    accepted: int = 0
    emitted: int = 0
    propose_s: float = 0.0
    """Time in `propose`, seconds."""
    other_s: float = 0.0
    """Time in `begin`, `end` and `end_epoch`, seconds."""
    memory_bytes: int = 0
    """The most that the drafter had when an epoch was over."""

    @property
    def accepted_per_request_step(self) -> float:
        """Accepted draft tokens per request and step."""
        return self.accepted / max(self.request_steps, 1)

    @property
    def drafted_per_request_step(self) -> float:
        """Draft tokens per request and step."""
        return self.drafted / max(self.request_steps, 1)

    @property
    def acceptance_rate(self) -> float:
        """Share of the draft tokens that were accepted."""
        return self.accepted / max(self.drafted, 1)

    @property
    def us_per_request_step(self) -> float:
        """Drafter time per request and step, all its calls, microseconds."""
        return (self.propose_s + self.other_s) / max(self.request_steps, 1) * 1e6


@dataclass
class ReplayResult:
    """Counts of every epoch, in order."""

    epochs: dict[int, Counts] = field(default_factory=dict)

    @property
    def total(self) -> Counts:
        """The sum over all epochs; of the memory, the most."""
        total = Counts()
        for counts in self.epochs.values():
            for name, value in vars(counts).items():
                old = getattr(total, name)
                setattr(total, name, max(old, value) if name == "memory_bytes" else old + value)
        return total


@dataclass(slots=True)
class _Request:
    name: str
    rollout: Rollout
    position: int = 0
    draft: list[int] = field(default_factory=list)

    def verify(self) -> tuple[int, Sequence[int]]:
        """Compare the draft with the record; returns accepted tokens, and all tokens of this step."""
        tokens, accepted = self.rollout.token_ids, 0
        most = min(len(self.draft), len(tokens) - self.position)
        while accepted < most and self.draft[accepted] == tokens[self.position + accepted]:
            accepted += 1
        emitted = tokens[self.position : self.position + accepted + 1]
        self.position += len(emitted)
        return accepted, emitted


def replay(rollouts: Iterable[Rollout], drafter: ReplayDrafter, concurrency: int | None = None) -> ReplayResult:
    """Run a drafter over recorded rollouts.

    Args:
        rollouts: in the order in which their steps ran.
        drafter: a fresh one.
        concurrency: most live requests; None: all of a step.

    Raises:
        DraftError: if `concurrency` is below 1, or an epoch comes up again after a later one.
    """
    if concurrency is not None and concurrency < 1:
        raise DraftError(f"concurrency must be at least 1; got {concurrency}")
    result = ReplayResult()
    for epoch, of_epoch in groupby(rollouts, key=lambda rollout: rollout.epoch):
        if epoch in result.epochs:
            raise DraftError(f"epoch {epoch} comes up again after another one; order the rollouts by epoch and step")
        counts = result.epochs[epoch] = Counts()
        for step, of_step in groupby(of_epoch, key=lambda rollout: rollout.step):
            waiting = deque(
                _Request(f"{epoch}/{step}/{i}", rollout) for i, rollout in enumerate(of_step) if rollout.token_ids
            )
            _run_step(waiting, drafter, concurrency or len(waiting), counts)
        counts.memory_bytes = drafter.memory_bytes()
        started = time.perf_counter()
        drafter.end_epoch(epoch)
        counts.other_s += time.perf_counter() - started
    return result


def _run_step(waiting: deque[_Request], drafter: ReplayDrafter, concurrency: int, counts: Counts) -> None:
    live: list[_Request] = []
    clock = time.perf_counter
    while waiting or live:
        while waiting and len(live) < concurrency:
            request = waiting.popleft()
            started = clock()
            drafter.begin(request.name, request.rollout.problem, request.rollout.prompt_token_ids)
            counts.other_s += clock() - started
            live.append(request)
        counts.engine_steps += 1
        new_token_ids = []
        for request in live:
            counts.request_steps += request.position > 0
            counts.drafted += len(request.draft)
            accepted, emitted = request.verify()
            counts.accepted += accepted
            counts.emitted += len(emitted)
            new_token_ids.append(emitted)
        started = clock()
        # As in vLLM, the drafter is asked before the engine notices that a request is over.
        drafts = drafter.propose([request.name for request in live], new_token_ids)
        counts.propose_s += clock() - started
        rest = []
        for request, draft in zip(live, drafts, strict=True):
            request.draft = draft
            if request.position < len(request.rollout.token_ids):
                rest.append(request)
                continue
            started = clock()
            drafter.end(request.name)
            counts.other_s += clock() - started
        live = rest


class _FixedThreshold(Planner):
    """Drafts end where their path becomes less likely than `threshold`, whatever a step costs."""

    def __init__(self, max_draft: int, threshold: float):
        super().__init__("fixed", max_draft)
        self.threshold = threshold

    def plan(
        self, problems_N: npt.NDArray[np.int64], generated_N: npt.NDArray[np.int64], limits_N: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float32]]:
        max_draft_tokens_N, _ = super().plan(problems_N, generated_N, limits_N)
        return max_draft_tokens_N, np.full(len(max_draft_tokens_N), self.threshold, np.float32)


class Das:
    """`SuffixDrafter` without costs: every draft as long as the cap and `threshold` allow.

    Args:
        max_draft: longest draft, tokens.
        threshold: least probability of a draft's path. 0: the index's own limit.
        config: other settings of the drafter; `num_speculative_tokens` and `policy` are set here.
    """

    def __init__(self, max_draft: int, threshold: float = 0.0, **config: Any):
        self.drafter = SuffixDrafter(
            DraftConfig(method="das", num_speculative_tokens=max_draft, policy="fixed", **config)
        )
        self.drafter.planner = _FixedThreshold(max_draft, threshold)
        self.max_draft = max_draft

    def begin(self, name: str, problem: str, prompt_token_ids: Sequence[int]) -> None:
        self.drafter.begin(name, problem, prompt_token_ids)

    def propose(self, names: Sequence[str], new_token_ids: Sequence[Sequence[int]]) -> list[list[int]]:
        return self.drafter.propose(names, new_token_ids, self.max_draft)

    def end(self, name: str) -> None:
        self.drafter.end(name)

    def end_epoch(self, epoch: int) -> None:
        self.drafter.close_epoch(epoch)

    def memory_bytes(self) -> int:
        return sum(self.drafter.index.memory_bytes().values())

    def by_source(self) -> dict[tuple[str, str], npt.NDArray[np.int64]]:
        """Return and reset (source, match length) of a draft's first token -> int64 [drafts, drafted, accepted]."""
        return self.drafter.take_source_stats()


class Ngram:
    """The drafts of vLLM's `ngram`: what followed the earliest occurrence of the longest n-gram that ends the text.

    Looks only into the request's own prompt and output. vLLM searches the text in every step; here its n-grams are kept
    in a table, so the drafts are vLLM's (v1/spec_decode/ngram_proposer.py) and the time is not.
    """

    def __init__(self, max_draft: int, min_n: int = 2, max_n: int = 4):
        self.max_draft, self.min_n, self.max_n = max_draft, min_n, max_n
        self._texts: dict[str, list[int]] = {}
        self._first: dict[str, dict[tuple[int, ...], int]] = {}
        """n-gram -> index of the token behind its earliest occurrence."""

    def begin(self, name: str, problem: str, prompt_token_ids: Sequence[int]) -> None:
        self._texts[name], self._first[name] = [], {}
        self._append(name, prompt_token_ids)

    def propose(self, names: Sequence[str], new_token_ids: Sequence[Sequence[int]]) -> list[list[int]]:
        drafts = []
        for name, tokens in zip(names, new_token_ids, strict=True):
            self._append(name, tokens)
            drafts.append(self._draft(self._texts[name], self._first[name]))
        return drafts

    def end(self, name: str) -> None:
        del self._texts[name], self._first[name]

    def end_epoch(self, epoch: int) -> None:
        pass

    def memory_bytes(self) -> int:
        return 0

    def _append(self, name: str, tokens: Sequence[int]) -> None:
        text, first = self._texts[name], self._first[name]
        for token in tokens:
            text.append(token)
            for n in range(self.min_n, min(self.max_n, len(text)) + 1):
                first.setdefault(tuple(text[-n:]), len(text))

    def _draft(self, text: list[int], first: dict[tuple[int, ...], int]) -> list[int]:
        for n in range(min(self.max_n, len(text)), self.min_n - 1, -1):
            start = first[tuple(text[-n:])]
            if start < len(text):
                return text[start : start + self.max_draft]
        return []


class Arctic:
    """Arctic Inference's suffix decoding, called as vLLM's `suffix` does (v1/spec_decode/suffix_decoding.py).

    Args:
        max_draft: longest draft, tokens.
        depth, factor, min_probability: `suffix_decoding_max_tree_depth`, `_max_spec_factor` and `_min_token_prob` of
            vLLM; the defaults are vLLM's.
        max_cached: responses in the tree over all requests; the default is vLLM's.

    Raises:
        NotLiveError: if arctic-inference is not installed.
    """

    def __init__(
        self,
        max_draft: int,
        depth: int = 24,
        factor: float = 1.0,
        min_probability: float = 0.1,
        max_cached: int = 10000,
    ):
        try:
            from arctic_inference.suffix_decoding import SuffixDecodingCache
        except ImportError as error:
            raise NotLiveError(
                f"arctic-inference cannot be imported ({error}); scripts/install_arctic.sh installs its drafter"
            ) from error
        self.max_draft, self.depth, self.factor, self.min_probability = max_draft, depth, factor, min_probability
        self.cache = SuffixDecodingCache(max_tree_depth=depth, max_cached_requests=max_cached)
        self._texts: dict[str, npt.NDArray[np.int32]] = {}
        self._lengths: dict[str, int] = {}

    def begin(self, name: str, problem: str, prompt_token_ids: Sequence[int]) -> None:
        prompt = np.asarray(prompt_token_ids, np.int32)
        self.cache.start_request(name, prompt)
        self._texts[name] = np.concatenate([prompt, np.zeros(256, np.int32)])
        self._lengths[name] = len(prompt)

    def propose(self, names: Sequence[str], new_token_ids: Sequence[Sequence[int]]) -> list[list[int]]:
        drafts = []
        for name, tokens in zip(names, new_token_ids, strict=True):
            self.cache.add_active_response(name, tokens)
            draft = self.cache.speculate(
                name,
                self._context(name, tokens),
                max_spec_tokens=self.max_draft,
                max_spec_factor=self.factor,
                min_token_prob=self.min_probability,
            )
            drafts.append(draft.token_ids)
        return drafts

    def end(self, name: str) -> None:
        self.cache.stop_request(name)
        del self._texts[name], self._lengths[name]

    def end_epoch(self, epoch: int) -> None:
        pass

    def memory_bytes(self) -> int:
        """As the package estimates it for the tree over all requests."""
        return self.cache._global_tree.estimate_memory()

    def _context(self, name: str, tokens: Sequence[int]) -> npt.NDArray[np.int32]:
        length = self._lengths[name] + len(tokens)
        if length > len(self._texts[name]):
            self._texts[name] = np.concatenate([self._texts[name], np.zeros(length, np.int32)])
        self._texts[name][self._lengths[name] : length] = tokens
        self._lengths[name] = length
        return self._texts[name][max(0, length - self.depth) : length]
