"""A head in a rollout engine, whichever kind: leaves traces for its trainer, and takes what that publishes.

vLLM collects the outputs of a few layers for drafters like EAGLE-3 (`use_aux_hidden_state_outputs`); heads ask for
them. A step's rows are seen twice: in `_sample` with the logits before they are changed, and in
`propose_draft_token_ids` with what was accepted. Traces are left by `tap.py`.

Host symbols (vLLM 0.28.0): `GPUModelRunner.{_sample, propose_draft_token_ids, use_aux_hidden_state_outputs,
query_start_loc, requests, input_batch}`, `SpecDecodeMetadata.{num_draft_tokens, logits_indices}`.

Shape suffixes: R rows of logits, A hidden states.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from rl_accel.errors import NotLiveError
from rl_accel.hosts.verl import RUN_ENV
from rl_accel.hosts.vllm.faults import Faults
from rl_accel.speculator.client import TrainerClient
from rl_accel.speculator.config import SpeculatorConfig
from rl_accel.speculator.flat import FlatShape, normalized
from rl_accel.speculator.hosts.cores import Cores, Turns
from rl_accel.speculator.hosts.tap import Step, Tap
from rl_accel.speculator.ledger import Ledger
from rl_accel.speculator.state import state_file
from rl_accel.speculator.traces import RowLayout
from rl_accel.speculator.watch import ServedWatch

AUX_ARGUMENT = "aux_hidden_states"
"""Of `propose_draft_token_ids`."""
OFF = "heads_off"
REFUSED, ROLLED_BACK, SILENT = "weights_refused", "rolled_back", "alarms"


class Served(Protocol):
    """Weights as the engine runs them."""

    def load(self, folded: torch.Tensor) -> None:
        """Overwrite them in place, from what `Kind.fold` returned."""


class Source:
    """Between the model runner and the trainer process."""

    name = "head"
    gives_candidates = True
    """Whether the drafter asks it; else it is in vLLM's own."""

    def __init__(
        self,
        config: SpeculatorConfig,
        vllm_config: Any,
        faults: Faults,
        shape: FlatShape,
        layers: tuple[int, ...],
    ):
        """Args:
        layers: after which hidden states are taken.
        """
        rank = getattr(vllm_config.parallel_config, "data_parallel_index", 0)
        self.config, self.faults = replace(config, state=state_file(config.state, rank)), faults
        model = vllm_config.model_config
        self.shape, self.layers = shape, layers
        hidden = int(model.hf_text_config.hidden_size)
        self.layout = RowLayout(len(layers) * hidden, config.history + 1, int(model.get_vocab_size()))
        self.client: TrainerClient | None = None
        self.head: Served | None = None
        self.watch = ServedWatch(int(vllm_config.speculative_config.num_speculative_tokens))
        self.tap: Tap | None = None
        self.version = self._first_version = 0
        self._flat: npt.NDArray[np.float32] | None = None  # folded, of the served version
        self._previous: tuple[int, npt.NDArray[np.float32]] | None = None
        self._refused_version = 0
        self._step: Step | None = None
        self._aux: list[torch.Tensor] | None = None
        self._rows: npt.NDArray[np.int64] | None = None
        self._cores, self._turns = Cores(), Turns()
        self.ledger = Ledger(self._cores.crowding(config.threads), config.advance_s)
        self._seconds = dict.fromkeys(("propose", "swap"), 0.0)
        self._calls = dict.fromkeys(("propose", "swap"), 0)

    # Set-up.

    def attach(self, runner: Any, acts: bool = True) -> None:
        """Before the model is loaded: have hidden states collected, and look at every step.

        Args:
            acts: whether this rank drafts. All have to collect, so that they run the same model.
        """
        self.runner, self.acts = runner, acts
        runner.use_aux_hidden_state_outputs = True
        if not acts:
            return
        inner_sample, inner_propose = runner._sample, runner.propose_draft_token_ids
        parameters = list(inspect.signature(inner_propose).parameters)
        if AUX_ARGUMENT not in parameters:
            raise NotLiveError(
                f"rl_accel.speculator needs the argument {AUX_ARGUMENT} of vLLM's propose_draft_token_ids, which has "
                f"{', '.join(parameters)}; set rl_accel.draft.method=das, or none"
            )
        position = parameters.index(AUX_ARGUMENT)

        def sample(logits: torch.Tensor | None, spec_decode_metadata: Any) -> Any:
            if logits is not None:
                with self._contained():
                    self._see_logits(logits, spec_decode_metadata)
            return inner_sample(logits, spec_decode_metadata)

        def propose(*args: Any, **kwargs: Any) -> Any:
            with self._contained():
                self._aux = self._checked(kwargs[AUX_ARGUMENT] if AUX_ARGUMENT in kwargs else args[position])
                self._see_accepted(args[1])  # of drafts that the version before a swap made
                self.poll()
            try:
                return self._propose(inner_propose, *args, **kwargs)
            finally:
                self._step = self._aux = self._rows = None

        runner._sample, runner.propose_draft_token_ids = sample, propose

    def _start(self, first: torch.Tensor, serve: Callable[[torch.Tensor], Served]) -> None:
        """Start the trainer, and serve what it begins with.

        Args:
            first: float32 [num_weights].
            serve: makes `head` of folded weights.
        """
        self.client = TrainerClient(self.shape, self.layout, self.config, first)
        self.tap = Tap(self.runner, self.layout, self.client.ring, self.config.max_trace_share)
        self.version, folded, _ = self.client.slots.get()
        self._first_version = self.version
        assert folded is not None
        self._flat = folded
        self.head = serve(torch.from_numpy(folded))
        self._drained = self.client.slots.read_report()
        self._drained_s = 0.0, 0.0
        # Without learning the process is there for checkpoints only.
        self.client.slots.allowed_share = self._first_share() if self.config.learn else 0.0
        self.client.start()
        if self.config.trainer_tap and (run := os.environ.get(RUN_ENV)):
            self.client.tell("follow", run=run)
        if os.path.exists(self.config.state) and self.client.wait_ready():
            self.poll()  # the first requests get the head of the last run

    def go_on(self) -> None:
        """Serve what the trainer has opened in a run that goes on, and count from there."""
        self.poll()
        if self.client is not None:
            self._drained = self.client.slots.read_report()

    # Every step.

    @torch.inference_mode()
    def _see_logits(self, logits: torch.Tensor, metadata: Any) -> None:
        if self.head is None or self.tap is None or not self._looks():
            return
        started = time.perf_counter()
        num_requests = self.runner.input_batch.num_reqs
        drafted = list(metadata.num_draft_tokens) if metadata is not None else [0] * num_requests
        first_row = np.zeros(num_requests + 1, np.int64)
        np.cumsum(np.asarray(drafted, np.int64) + 1, out=first_row[1:])
        if metadata is None:
            indices = torch.from_numpy(self.runner.query_start_loc.np[1 : num_requests + 1].astype(np.int64) - 1)
        else:
            indices = metadata.logits_indices.long()
        self._step = Step(first_row, indices, drafted)
        if self._traces():
            self.tap.see_logits(self._step, logits, started)

    @torch.inference_mode()
    def _see_accepted(self, sampled: list[list[int]]) -> None:
        """Note where each request's last accepted token lies, and leave traces."""
        started, step = time.perf_counter(), self._step
        if step is None or self._aux is None or self.head is None or self.tap is None:
            return
        num_sampled = np.fromiter(map(len, sampled), np.int64, len(sampled))
        self._rows = step.first_row[:-1] + num_sampled - 1
        self.tap.see_accepted(step, num_sampled, self._hidden, self.version, started)

    def _checked(self, aux: list[torch.Tensor] | None) -> list[torch.Tensor]:
        if aux is None or len(aux) != len(self.layers):
            raise NotLiveError(
                f"vLLM handed out hidden states of {len(aux or [])} layers; {len(self.layers)} were asked for"
            )
        return aux

    def _hidden(self, indices: torch.Tensor) -> torch.Tensor:
        """Return normalized hidden states of tokens of the step, float32 [rows, A]."""
        assert self._aux is not None
        indices = indices.to(self._aux[0].device)
        return normalized(torch.cat([layer[indices] for layer in self._aux], -1).float(), len(self._aux))

    def _embeddings(self, policy: Any) -> torch.Tensor | None:
        """Return the policy's, [V, H] on the CPU, None where they are not whole here."""
        embed = whole_weight(policy, "embed_tokens")
        return None if embed is None else embed[: self.layout.vocab_size]  # vLLM pads the vocabulary

    def _propose(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Have vLLM ask its drafter; the drafts."""
        return inner(*args, **kwargs)

    def _looks(self) -> bool:
        """Whether somebody needs to know where the rows of this step lie."""
        return True

    def _first_share(self) -> float:
        """Return the share of the time that the trainer may train at first."""
        return 1.0

    def observe(
        self,
        paths_RK: npt.NDArray[np.float32],
        lengths_R: npt.NDArray[np.int64],
        num_accepted_R: npt.NDArray[np.int64],
    ) -> None:
        """As `CandidateSource.observe`; goes back to the version before where this one does worse than it says."""
        verdict = self.watch.observe(paths_RK, lengths_R, num_accepted_R)
        if verdict == "worse" and self._previous is not None:
            self._roll_back()
        elif verdict == "silent":
            self.faults.note(
                SILENT, "drafts of the speculator are hardly ever accepted; it is silent until its next version"
            )

    @contextmanager
    def _contained(self) -> Iterator[None]:
        """Whatever fails in here, the engine's tokens do not need it: drafting goes on without the head."""
        try:
            yield
        except Exception as error:
            self.faults.note(OFF, "the speculator failed, the engine goes on without it", error=error)
            self.head = self._step = self._rows = None

    # New weights.

    def poll(self) -> None:
        """Between two steps: take the version that the trainer has published since."""
        client = self.client
        if client is None:
            return
        self._cores.leave(self.config.threads if client.slots.busy and client.alive else 0)
        if client.slots.version in (self.version, self._refused_version):
            return
        started = time.perf_counter()
        version, flat, problem = client.slots.get()
        if flat is None:
            self._refused_version = version
            self.faults.note(REFUSED, "version %d of the speculator is not served: %s", version, problem)
            return
        self._previous = (self.version, self._flat) if self._flat is not None else None
        self._install(version, flat)
        self._count("swap", started, 1)

    def _install(self, version: int, flat: npt.NDArray[np.float32]) -> None:
        assert self.head is not None
        with torch.inference_mode():
            self.head.load(torch.from_numpy(flat))
        self._flat, self.version = flat, version
        self.watch.begin()

    def _roll_back(self) -> None:
        assert self._previous is not None and self.client is not None
        bad, (version, flat) = self.version, self._previous
        self.faults.note(
            ROLLED_BACK, "version %d of the speculator does worse than version %d, which is back", bad, version
        )
        self._previous, self._refused_version = None, bad
        self._install(version, flat)
        self.client.tell("serve", version=version)

    def drain(self) -> dict[str, float]:
        """Return what happened since the last call, by the names of the feature's table."""
        if self.client is None or self.tap is None:
            return {}
        report, calls, seconds = self.client.slots.read_report(), self._calls, self._seconds
        found = {
            "version": float(self.version),
            "swaps": float(calls["swap"]),
            "swap_ms": 1e3 * seconds["swap"] / max(calls["swap"], 1),
            **{kind: float(self.faults.counts[kind]) for kind in (REFUSED, ROLLED_BACK, SILENT, OFF)},
            "candidates_refused": float(report.num_refused),
            "propose_ms": 1e3 * seconds["propose"] / max(calls["propose"], 1),
            "num_asked": float(calls["propose"]),
            **self.tap.drain(),
            "rows_lost": float(report.lost_rows),
            "rows_from_trainer": float(report.rank_rows - self._drained.rank_rows),
            "train_steps": float(report.num_steps - self._drained.num_steps),
            "train_s": report.train_s - self._drained.train_s,
            "train_share": self.client.slots.allowed_share,
            "train_slowdown": self.ledger.slowdown,
            "advance_s": -1.0 if self.ledger.advance_s is None else self.ledger.advance_s,
            "saved_s": self.ledger.saved_s - self._drained_s[0],
            "charged_s": self.ledger.charged_s - self._drained_s[1],
            "held_out_accept": report.held_out_accept,
            "served_accept": report.served_accept,
            "calibration": self.watch.calibration,
            "rejected_weight": report.rejected_weight,
            "trainers_gone": float(not self.client.alive),
        }
        self._drained = report
        self._drained_s = self.ledger.saved_s, self.ledger.charged_s
        self._seconds, self._calls = dict.fromkeys(seconds, 0.0), dict.fromkeys(calls, 0)
        return found

    # Helpers.

    def _traces(self) -> bool:
        """Whether this step leaves traces."""
        client, tap = self.client, self.tap
        if client is None or tap is None or not tap.bursts.on:
            return False
        return client.slots.allowed_share > 0.0 and client.alive

    def _count(self, what: str, started: float, calls: int) -> None:
        self._seconds[what] += time.perf_counter() - started
        self._calls[what] += calls


def whole_weight(model: Any, name: str) -> torch.Tensor | None:
    """Return the weight of a module of the policy on the CPU, None where it is not whole here."""
    for found, module in model.named_modules():
        if found.endswith(name):
            weight = getattr(module, "weight", None)
            if isinstance(weight, torch.Tensor) and weight.ndim == 2:
                return weight.detach().float().cpu()
    return None
