"""Traces of an engine's steps: which requests leave them, and what a row says.

A request is traced from its first token to its last, or not at all: chains need adjacent rows. How many are follows
from what traces take of the engine's time.

Host symbols (vLLM 0.28.0): `GPUModelRunner.{requests, input_batch}`, `InputBatch.{req_ids, num_tokens_no_spec,
token_ids_cpu, temperature_cpu}`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rl_accel.hosts.vllm.request_identity import identity_of
from rl_accel.identity import hash64
from rl_accel.speculator.traces import TOP_K, RowLayout, TraceRing, trace_name

MIN_SHARE = 1 / 64
"""Of the requests, that are traced at least."""
LITTLE = 0.1
"""Share of the time for training below which traces are left in bursts: a few rows cost an engine step as much as many,
0.3 to 0.5 ms."""
BURST_ROWS, BURST_EVERY_S = 4096, 60.0
"""Rows of a burst, and seconds of engine steps between two."""
ADAPT_EVERY = 64
"""Steps."""


@dataclass
class Step:
    """Where the rows of logits of a step lie."""

    first_row: npt.NDArray[np.int64]
    """Of each request, its first row of logits, [requests + 1]."""
    indices: torch.Tensor
    """Where the rows of logits lie among the step's tokens, int64 [R]."""
    num_draft_tokens: list[int]
    traced: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Requests that leave traces."""
    target: torch.Tensor | None = None
    """Logits of their rows, all of the first, then of the second; of a large vocabulary the best ones."""
    target_ids: torch.Tensor | None = None


class Tap:
    """Writes the rows of one engine."""

    def __init__(self, runner: Any, layout: RowLayout, ring: TraceRing, max_share: float):
        self.runner, self.layout, self.ring, self.max_share = runner, layout, ring, max_share
        self.policy_version = 0
        self._affordable, self._useful = 1.0, True
        self._burst_from, self._burst_s = 0, 0.0
        self._traced: dict[str, bool] = {}  # requests of the batch
        self._engine_s, self._seconds, self._steps = 0.0, 0.0, 0  # since `_affordable` was adapted
        self._total_s, self._total_steps = 0.0, 0
        self._drained_s, self._drained_steps, self._drained_rows = 0.0, 0, 0

    @property
    def share(self) -> float:
        """Of the requests, that are traced: what `max_share` of the time allows, and whether the trainer needs them."""
        return self._affordable if self._useful else 0.0

    def see_logits(self, step: Step, logits: torch.Tensor, started: float) -> None:
        """Keep the distributions of traced requests, before the sampler changes them; `started`: when that began."""
        names = self.runner.input_batch.req_ids[: len(step.num_draft_tokens)]
        traced = self._traced
        if not self._useful:
            traced = self._traced = {}
        elif not (len(names) == len(traced) and all(name in traced for name in names)):
            traced = self._traced = {name: traced.get(name, False) or self._is_traced(name) for name in names}
        step.traced = np.array([i for i, name in enumerate(names) if traced[name]] if traced else [], np.int64)
        if len(step.traced):
            rows = ranges(step.first_row[step.traced], step.first_row[step.traced + 1])
            picked = logits if len(rows) == len(logits) else logits[torch.from_numpy(rows).to(logits.device)]
            if self.layout.dense:
                step.target = picked.half()
            else:
                best, step.target_ids = picked.float().topk(TOP_K, -1)
                step.target = (best - best[:, :1]).half()
        self._count(started)

    def see_accepted(
        self,
        step: Step,
        num_sampled: npt.NDArray[np.int64],
        hidden: Callable[[torch.Tensor], torch.Tensor],
        draft_version: int,
        started: float,
    ) -> None:
        """Write a row for each token that traced requests have gained.

        Args:
            num_sampled: tokens that each request has gained.
            hidden: hidden states of tokens of the step, by their indices.
        """
        if len(step.traced) and num_sampled[step.traced].any():
            self._write(step, num_sampled, hidden, draft_version)
        self._count(started)
        self._steps += 1
        self._total_steps += 1

    def observe_step(self, seconds: float, train_share: float) -> None:
        """Take the time of an engine step, and the share of the time that the trainer may train.

        Pauses between rollouts are no time of the engine.
        """
        self._engine_s += seconds
        self._burst_s += seconds
        if self._burst_s >= BURST_EVERY_S:
            self._burst_from, self._burst_s = self.ring.num_written, 0.0
        self._useful = train_share >= LITTLE or self.ring.num_written - self._burst_from < BURST_ROWS
        if self._steps >= ADAPT_EVERY:
            change = min(self.max_share * self._engine_s / max(self._seconds, 1e-9), 2.0)
            self._affordable = min(1.0, max(self._affordable * change, MIN_SHARE))
            self._engine_s, self._seconds, self._steps = 0.0, 0.0, 0

    def drain(self) -> dict[str, float]:
        """Return metrics since the last call."""
        steps = max(self._total_steps - self._drained_steps, 1)
        found = {
            "tap_ms": 1e3 * (self._total_s - self._drained_s) / steps,
            "traced_share": self.share,
            "rows_traced": float(self.ring.num_written - self._drained_rows),
        }
        self._drained_s, self._drained_steps = self._total_s, self._total_steps
        self._drained_rows = self.ring.num_written
        return found

    def _count(self, started: float) -> None:
        spent = time.perf_counter() - started
        self._seconds += spent
        self._total_s += spent

    def _write(
        self,
        step: Step,
        num_sampled: npt.NDArray[np.int64],
        hidden: Callable[[torch.Tensor], torch.Tensor],
        draft_version: int,
    ) -> None:
        assert step.target is not None
        seen = step.traced
        batch, gained = self.runner.input_batch, num_sampled[seen] > 0
        sizes = step.first_row[seen + 1] - step.first_row[seen]
        starts = (np.cumsum(sizes) - sizes)[gained]
        traced = seen[gained]
        counts = num_sampled[traced]
        rows = ranges(step.first_row[traced], step.first_row[traced] + counts)
        in_target = torch.from_numpy(ranges(starts, starts + counts)).to(step.target.device)
        ends = batch.num_tokens_no_spec[traced].astype(np.int64)
        position = ranges(ends - counts - 1, ends - 1)
        where = position[:, None] + 1 - np.arange(self.layout.num_tokens)[None]
        first = np.cumsum(counts) - counts
        drafted = np.full(len(rows), -1, np.int16)
        accepted = np.full(len(rows), -1, np.int16)
        drafted[first], accepted[first] = np.asarray(step.num_draft_tokens)[traced], counts - 1
        names = np.array([self._name(batch.req_ids[i]) for i in traced], np.int64)
        values: dict[str, Any] = {
            "request": np.repeat(names, counts),
            "position": position.astype(np.int32),
            "policy": self.policy_version,
            "draft": draft_version,
            "drafted": drafted,
            "accepted": accepted,
            "temperature": np.repeat(batch.temperature_cpu[traced], counts).astype(np.float16),
            "tokens": batch.token_ids_cpu[np.repeat(traced, counts)[:, None], np.maximum(where, 0)],
            "aux": hidden(step.indices[torch.from_numpy(rows)]).half().cpu().numpy(),
            "target": step.target[in_target].cpu().numpy(),
        }
        if step.target_ids is not None:
            values["target_ids"] = step.target_ids[in_target].int().cpu().numpy()
        self.ring.put(values)

    def _name(self, request_id: str) -> int:
        request = self.runner.requests[request_id]
        try:
            return request.rl_accel_trace
        except AttributeError:
            identity = identity_of(request, self.runner.rl_accel_faults)
            anonymous = f"{self.policy_version}/{request_id}"
            name = request.rl_accel_trace = trace_name(identity) if identity else hash64(anonymous.encode())
            return name

    def _is_traced(self, request_id: str) -> bool:
        return (self._name(request_id) & 0xFFFF) < self.share * 0x10000


def ranges(starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return starts[0] .. ends[0] - 1, starts[1] .. ends[1] - 1, and so on."""
    counts = ends - starts
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(starts - before, counts)
