"""Traces of an engine's steps: what a row says. Which steps leave them: `bursts.py`.

Host symbols (vLLM 0.28.0): `GPUModelRunner.{requests, input_batch}`, `InputBatch.{req_ids, num_tokens_no_spec,
token_ids_cpu, temperature_cpu}`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rl_accel.hosts.vllm.request_identity import identity_of
from rl_accel.identity import hash64
from rl_accel.speculator.bursts import Bursts
from rl_accel.speculator.traces import TOP_K, RowLayout, TraceRing, trace_name


@dataclass
class Step:
    """Where the rows of logits of a step lie."""

    first_row: npt.NDArray[np.int64]
    """Of each request, its first row of logits, [requests + 1]."""
    indices: torch.Tensor
    """Where the rows of logits lie among the step's tokens, int64 [R]."""
    num_draft_tokens: list[int]
    target: torch.Tensor | None = None
    """Logits of all rows, of a large vocabulary the best ones; None: the step leaves no traces."""
    target_ids: torch.Tensor | None = None


class Tap:
    """Writes the rows of one engine."""

    def __init__(self, runner: Any, layout: RowLayout, ring: TraceRing, max_share: float):
        self.runner, self.layout, self.ring, self.bursts = runner, layout, ring, Bursts(max_share)
        self.policy_version = 0
        self._seconds, self._steps, self._traced_steps, self._drained_rows = 0.0, 0, 0, 0

    def see_logits(self, step: Step, logits: torch.Tensor, started: float) -> None:
        """Keep the distributions before the sampler changes them; `started`: when that began."""
        if self.layout.dense:
            step.target = logits.half()
        else:
            best, step.target_ids = logits.float().topk(TOP_K, -1)
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
        """Write a row for each token that requests have gained, where the step leaves traces.

        Args:
            num_sampled: tokens that each request has gained.
            hidden: hidden states of tokens of the step, by their indices.
        """
        if step.target is not None and num_sampled.any():
            self._write(step, step.target, num_sampled, hidden, draft_version)
        self._count(started)
        self._steps += 1
        self._traced_steps += step.target is not None

    def observe_step(self, seconds: float, train_share: float) -> None:
        """As `Bursts.observe_step`."""
        self.bursts.observe_step(seconds, train_share, self.ring.num_written)

    def drain(self) -> dict[str, float]:
        """Return metrics since the last call."""
        steps, num_written = max(self._steps, 1), self.ring.num_written
        found = {
            "tap_ms": 1e3 * self._seconds / steps,
            "traced_share": self._traced_steps / steps,
            "rows_traced": float(num_written - self._drained_rows),
        }
        self._seconds, self._steps, self._traced_steps, self._drained_rows = 0.0, 0, 0, num_written
        return found

    def _count(self, started: float) -> None:
        spent = time.perf_counter() - started
        self._seconds += spent
        self.bursts.spend(spent)

    def _write(
        self,
        step: Step,
        target: torch.Tensor,
        num_sampled: npt.NDArray[np.int64],
        hidden: Callable[[torch.Tensor], torch.Tensor],
        draft_version: int,
    ) -> None:
        batch, traced = self.runner.input_batch, np.flatnonzero(num_sampled)
        counts = num_sampled[traced]
        rows = ranges(step.first_row[traced], step.first_row[traced] + counts)
        in_target = torch.from_numpy(rows).to(target.device)
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
            "target": target[in_target].cpu().numpy(),
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


def ranges(starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return starts[0] .. ends[0] - 1, starts[1] .. ends[1] - 1, and so on."""
    counts = ends - starts
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(starts - before, counts)
