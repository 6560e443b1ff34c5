"""The model that drafts ahead as a source of the drafter (`draft/combined.py`).

What it has written by the time of a step is offered; for more the engine waits only while the next token is likelier
to be accepted than what the engine writes in that time. A token's probability is the running share of its drafts that
were accepted, to the power of its depth.

Host symbols (vLLM 0.28.0): `GPUModelRunner.{execute_model,requests,input_batch}`, `SchedulerOutput.scheduled_new_reqs`,
`NewRequestData` and `CachedRequestState.{sampling_params,prompt_token_ids}`.

Shape suffixes: N requests, K draft tokens.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_accel.draft.ahead.client import AheadClient, Draft
from rl_accel.draft.ahead.messages import Sampling
from rl_accel.draft.config import DraftConfig, other_vocabulary
from rl_accel.draft.hosts.proposer import UNDRAFTED
from rl_accel.errors import NotLiveError
from rl_accel.quickstart.deep import shipped_policy
from rl_accel.sampling.hosts.row_identity import key_of

START_S = 300.0
GONE = "drafters_gone"
MAX_AHEAD_DRAFTS = 3
"""Longest drafts that a text is written ahead; they take the process's time, and are lost with a mismatch."""
MAX_TEXTS = 16
"""That are drafted at a time, fewer where the process would not get ahead of the engine."""
MIN_TOKENS_A_STEP = 2.0
"""That the process writes of a text in a step of the engine: the one that the policy writes, and one ahead."""
MEMORY = 0.98
"""What a draft weighs for the acceptance rate when the next one has been seen."""
FORGOTTEN = 8
"""Steps after which a source that was not asked does not begin with prompts: it does not pay at present."""
RATE = 0.1
"""Of running means over steps."""
PATIENCE, MIN_PATIENCE_S = 4.0, 2e-3
"""A token that has not come after so many times its usual seconds is not waited for."""


class AheadSource:
    """Asks the process; see `CandidateSource`."""

    name = "ahead"

    def __init__(self, config: DraftConfig, vllm_config: Any, runner: Any, stop_token_ids: list[int]):
        self.runner, self.faults = runner, runner.rl_accel_faults
        self.max_length = int(vllm_config.model_config.max_model_len)
        self.vocab_size = int(vllm_config.model_config.get_vocab_size())
        sampling = ((vllm_config.additional_config or {}).get("rl_accel") or {}).get("sampling") or {}
        self.seed: int | None = sampling.get("seed", 0) if sampling.get("exact") else None
        assert config.model is not None
        self._stops = frozenset(stop_token_ids)
        model = shipped_policy(os.path.expanduser(config.model))
        self.client = AheadClient(model, stop_token_ids, MAX_AHEAD_DRAFTS * config.max_draft, self.vocab_size)
        self._texts: dict[str, Draft | None] = {}
        self._good, self._bad = 3.0, 1.0
        self._step_s = 0.0
        """Of the engine, without this source; 0: not known yet."""
        self._gain = 1.0
        """Tokens of a text in a step."""
        self._steps_since_asked = 0
        self._seconds, self._calls = 0.0, 0

    def load(self, policy: Any) -> None:
        """Wait for the process: a run does not begin without it.

        Raises:
            NotLiveError: if the model cannot be loaded, or has another vocabulary.
        """
        if not self.client.wait_ready(START_S):
            raise NotLiveError("the process that drafts ahead did not load rl_accel.draft.model; see above")
        if problem := other_vocabulary(self.client.vocab_size or 0, self.vocab_size):
            raise NotLiveError(problem)
        self._begin_with_prompts()

    def _begin_with_prompts(self) -> None:
        """Let the process read a prompt, and write behind it, while the engine reads it."""
        execute_model = self.runner.execute_model

        @functools.wraps(execute_model)
        def begin_and_execute(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            self._steps_since_asked += 1
            if scheduler_output.scheduled_new_reqs and self._steps_since_asked < FORGOTTEN and self.ready:
                try:
                    self._expect(scheduler_output.scheduled_new_reqs)
                except Exception as error:  # the engine's tokens do not need it
                    self.faults.note(UNDRAFTED, "requests were not drafted from their prompts on", error=error)
            return execute_model(scheduler_output, *args, **kwargs)

        self.runner.execute_model = begin_and_execute

    def _expect(self, requests: Iterable[Any]) -> None:
        self._end_gone()
        for new in requests:
            if new.prompt_token_ids and new.sampling_params is not None and new.req_id not in self._texts:
                self._begin(new.req_id, new, new.prompt_token_ids)

    @property
    def present(self) -> bool:
        return self.client.ready

    @property
    def ready(self) -> bool:
        if self.client.ready:
            return True
        if not self.client.alive and not self.faults.counts[GONE]:
            self.faults.note(GONE, "the process that drafts ahead is gone, the engine goes on without drafts")
        return False

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that are accepted, where the one before was."""
        return self._good / (self._good + self._bad)

    def candidates(
        self,
        rows_N: npt.NDArray[np.uint32],
        num_tokens_N: npt.NDArray[np.uint32],
        token_ids: npt.NDArray[np.int32],
        max_draft_tokens_N: npt.NDArray[np.uint32],
        min_path_probs_N: npt.NDArray[np.float32],
        min_step_gain: float,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """As `CandidateSource.candidates`."""
        started = time.perf_counter()
        self._steps_since_asked = 0
        self.client.read()
        self._end_gone()
        names = self.runner.input_batch.req_ids
        texts = [
            self._follow(names[row], token_ids[row, :num_tokens])
            for row, num_tokens in zip(rows_N.tolist(), num_tokens_N.tolist(), strict=True)
        ]
        chance = self.acceptance
        with np.errstate(divide="ignore"):
            worth_N = np.floor(np.log(np.maximum(min_path_probs_N, 1e-6)) / math.log(chance)).astype(np.int64)
        wanted_N = np.minimum(max_draft_tokens_N, worth_N)
        self._wait(texts, wanted_N, chance)
        width = max(1, int(wanted_N.max(initial=0)))
        tokens_NK, paths_NK = np.zeros((len(texts), width), np.int64), np.zeros((len(texts), width), np.float32)
        for i, (text, wanted) in enumerate(zip(texts, wanted_N.tolist(), strict=True)):
            found = text.ahead[:wanted] if text is not None else []
            tokens_NK[i, : len(found)] = found
            paths_NK[i, : len(found)] = chance ** np.arange(1, len(found) + 1)
        self._seconds += time.perf_counter() - started
        self._calls += 1
        return tokens_NK, paths_NK

    def _follow(self, name: str, ids: npt.NDArray[np.int32]) -> Draft | None:
        """Tell the process what a request has gained; returns its text, None where it is not drafted."""
        if name in self._texts:
            text = self._texts[name]
            if text is not None and len(ids) > len(text.ids):
                self.client.verify(text, ids[len(text.ids) :].tolist())
            return text
        return self._begin(name, self.runner.requests[name], ids.tolist())

    def _begin(self, name: str, request: Any, ids: list[int]) -> Draft | None:
        """Have a request drafted, if there is room."""
        if len(self.client.drafts) >= self._max_texts():
            return None
        params = request.sampling_params
        limit = min(self.max_length, len(request.prompt_token_ids) + (params.max_tokens or self.max_length))
        sampling = Sampling()
        if self.seed is not None:  # the policy's own noise
            key = key_of(request, self.seed, self.faults)
            sampling = Sampling(key, params.temperature, max(params.top_k, 0), params.top_p)
        text = self._texts[name] = self.client.begin(ids, sampling, limit)
        return text

    def _max_texts(self) -> int:
        if not (self._step_s and self.client.seconds):
            return 1
        return max(1, min(MAX_TEXTS, int(self._step_s / (MIN_TOKENS_A_STEP * self.client.seconds))))

    def _end_gone(self) -> None:
        """End texts of requests that have ended, and the last ones where there are too many."""
        for name in self._texts.keys() - self.runner.requests.keys():
            text = self._texts.pop(name)
            if text is not None:
                self.client.end(text)
        followed = [name for name, text in self._texts.items() if text is not None]
        for name in followed[self._max_texts() + 1 :]:
            text, self._texts[name] = self._texts[name], None
            if text is not None:
                self.client.end(text)

    def _wait(self, texts: list[Draft | None], wanted_N: npt.NDArray[np.int64], chance: float) -> None:
        """Wait for tokens that are likelier to be accepted than the engine writes one in that time."""
        if not self._step_s:
            return
        tokens_per_s = len(texts) * self._gain / self._step_s
        deadline = time.perf_counter() + self._patience()
        while self.client.ready:
            depths = [
                len(text.ahead)
                for text, wanted in zip(texts, wanted_N.tolist(), strict=True)
                if text is not None and len(text.ahead) < wanted and not (text.ahead and text.ahead[-1] in self._stops)
            ]
            least = min(depths, default=None)
            if least is None or chance ** (least + 1) < tokens_per_s * self.client.seconds:
                return
            left = deadline - time.perf_counter()
            if left <= 0.0:
                return
            if self.client.read(left):
                deadline = time.perf_counter() + self._patience()

    def _patience(self) -> float:
        return max(PATIENCE * self.client.seconds, MIN_PATIENCE_S)

    def observe(
        self,
        paths_RK: npt.NDArray[np.float32],
        lengths_R: npt.NDArray[np.int64],
        num_accepted_R: npt.NDArray[np.int64],
    ) -> None:
        """As `CandidateSource.observe`."""
        kept = MEMORY ** len(lengths_R)
        self._good = kept * self._good + float(num_accepted_R.sum())
        self._bad = max(kept * self._bad + float((num_accepted_R < lengths_R).sum()), 0.01)
        self._gain += RATE * (1.0 + float(num_accepted_R.mean()) - self._gain)

    def chain_seconds(self, num_rows: int) -> float:
        return num_rows * self.client.seconds

    def observe_step(
        self, seconds: float, predicted: float, fixed: float, saved: float, potential: float | None
    ) -> None:
        """As `CandidateSource.observe_step`; the process needs no allowance."""
        self._step_s += RATE * (seconds - self._step_s) if self._step_s else seconds

    def drain(self) -> dict[str, float]:
        """Return what happened since the last call."""
        found = {
            "ahead_ms": 1e3 * self._seconds / max(self._calls, 1),
            "ahead_token_ms": 1e3 * self.client.seconds,
            "ahead_acceptance": self.acceptance,
            GONE: float(self.faults.counts[GONE]),
        }
        self._seconds, self._calls = 0.0, 0
        return found
