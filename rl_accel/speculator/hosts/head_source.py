"""The recurrent head in a rollout engine: what the drafter asks beside history.

Only the tensor-parallel rank whose drafts vLLM uses has a head. Cost: `rl_accel/speculator/propose_ms` and `tap_ms`.

Host symbols (vLLM 0.28.0): the interface `SupportsEagle3`, whose `get_eagle3_default_aux_hidden_state_layers` a model
may override; those of `source.py`.

Shape suffixes: N requests that draft, R rows of logits, A hidden states, K draft tokens.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rl_accel.errors import NotLiveError
from rl_accel.hosts.vllm.faults import Faults
from rl_accel.speculator.config import SpeculatorConfig
from rl_accel.speculator.head import HeadShape, first_weights
from rl_accel.speculator.hosts.source import Source
from rl_accel.speculator.served import ServedHead
from rl_accel.speculator.traces import aux_layers

MAX_WIDTH = 512
MANY_ROWS, CHAIN = 128, 4
"""Rows and tokens of the drafts by which the head's time is measured before the first request."""


class HeadSource(Source):
    """A `CandidateSource` for the drafter."""

    shape: HeadShape
    head: ServedHead | None

    def __init__(self, config: SpeculatorConfig, vllm_config: Any, faults: Faults):
        model = vllm_config.model_config
        hidden, layers = int(model.hf_text_config.hidden_size), aux_layers(int(model.hf_text_config.num_hidden_layers))
        width = config.width or min(hidden, MAX_WIDTH)
        shape = HeadShape(int(model.get_vocab_size()), hidden, len(layers), width, 2 * width, config.history)
        super().__init__(config, vllm_config, faults, shape, layers)

    def load(self, model: Any) -> None:
        """The policy is loaded: make the head and start its trainer.

        Raises:
            NotLiveError: if vLLM cannot hand out hidden states of this model.
        """
        from vllm.model_executor.models.interfaces import supports_eagle3

        if not supports_eagle3(model):
            raise NotLiveError(
                "rl_accel.speculator needs hidden states of the policy, and vLLM hands out none of "
                f"{type(model).__name__}; set rl_accel.draft.method=das, or none"
            )
        model.get_eagle3_default_aux_hidden_state_layers = lambda: self.layers  # vLLM asks after its drafter is loaded
        if not self.acts:
            return
        first = first_weights(self.shape, self.config.seed, self._embeddings(model))
        self._start(first, lambda folded: ServedHead(self.shape, folded, self.runner.device))
        self._chain_s = [self._time_chain(num_rows) for num_rows in (1, MANY_ROWS)]

    @property
    def ready(self) -> bool:
        return self._knows and self.present

    @property
    def present(self) -> bool:
        return self.head is not None and self._rows is not None and self._aux is not None

    @property
    def _knows(self) -> bool:
        """Whether the head has learned something, and is not silent."""
        return self.version > self._first_version and not self.watch.silent

    def _looks(self) -> bool:
        undecided = self.ledger.advance_s is None  # drafts may be made to learn what they cost
        return undecided or self._knows or self._traces()

    def _first_share(self) -> float:
        return self.ledger.share

    @torch.inference_mode()
    def candidates(
        self,
        rows_N: npt.NDArray[np.uint32],
        num_tokens_N: npt.NDArray[np.uint32],
        token_ids: npt.NDArray[np.int32],
        max_draft_tokens_N: npt.NDArray[np.uint32],
        min_path_probs_N: npt.NDArray[np.float32],
        min_step_gain: float,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """As `CandidateSource.candidates`; nothing where the head fails."""
        with self._contained():
            return self._draft(rows_N, num_tokens_N, token_ids, max_draft_tokens_N, min_path_probs_N, min_step_gain)
        return np.zeros((len(rows_N), 1), np.int64), np.zeros((len(rows_N), 1), np.float32)

    def _draft(
        self,
        rows_N: Any,
        num_tokens_N: Any,
        token_ids: Any,
        max_draft_tokens_N: Any,
        min_path_probs_N: Any,
        gain: float,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        assert self.head is not None and self._rows is not None and self._step is not None
        started = time.perf_counter()
        rows = rows_N.astype(np.int64)
        aux = self._hidden(self._step.indices[torch.from_numpy(self._rows[rows])])
        where = num_tokens_N.astype(np.int64)[:, None] - 1 - np.arange(self.layout.num_tokens)
        tokens = torch.from_numpy(token_ids[rows[:, None], np.maximum(where, 0)].astype(np.int64)).to(self.head.device)
        min_probs = torch.from_numpy(min_path_probs_N)
        longest = int(max_draft_tokens_N.max())
        drafts, paths = self.head.draft(aux, tokens, longest, min_probs, gain, self.watch.temperatures_K.tolist())
        found = drafts.cpu().numpy(), paths.cpu().numpy()
        self._count("propose", started, 1)
        return found

    def chain_seconds(self, num_rows: int) -> float:
        """As `CandidateSource.chain_seconds`."""
        few, many = self._chain_s
        return few + (many - few) * (num_rows - 1) / (MANY_ROWS - 1)

    @torch.inference_mode()
    def _time_chain(self, num_rows: int) -> float:
        """Return the seconds of a token of each of `num_rows` chains, measured."""
        assert self.head is not None
        aux = torch.zeros(num_rows, self.layout.num_features, device=self.head.device)
        tokens = torch.zeros(num_rows, self.layout.num_tokens, dtype=torch.int64, device=self.head.device)
        times = []
        for _ in range(4):
            started = time.perf_counter()
            self.head.draft(aux, tokens, CHAIN, torch.zeros(num_rows))[0].cpu()
            times.append((time.perf_counter() - started) / CHAIN)
        return min(times)

    def observe_step(
        self, seconds: float, predicted: float, fixed: float, saved: float, potential: float | None
    ) -> None:
        """As `CandidateSource.observe_step`; the trainer trains as much as it earns, and when a core costs little."""
        if self.client is not None and self.tap is not None and self.config.learn:
            slots = self.client.slots
            self.tap.observe_step(seconds, slots.allowed_share)
            self.ledger.observe_saved(saved)
            busy = slots.busy
            self.ledger.observe_step(seconds, predicted, fixed, potential, busy, slots.train_step_s)
            slots.allowed_share = self.ledger.share
            needs_cores = self._turns.needs_cores(seconds, predicted, fixed, busy)
            slots.paused = needs_cores and self._cores.free < self.config.threads
