"""The draft head in a rollout engine: reads the policy's hidden states, drafts, and takes new weights.

vLLM collects the outputs of a few layers for drafters like EAGLE-3 (`use_aux_hidden_state_outputs`); the head asks for
the same. A step's rows are seen twice: in `_sample` with the logits before they are changed, and in
`propose_draft_token_ids` with what was accepted. Traces are left by `tap.py`.

Only the tensor-parallel rank whose drafts vLLM uses has a head. Cost: `rl_accel/speculator/propose_ms` and `tap_ms`.

Host symbols (vLLM 0.28.0): `GPUModelRunner.{_sample, propose_draft_token_ids, use_aux_hidden_state_outputs,
query_start_loc, requests, input_batch}`, `SpecDecodeMetadata.{num_draft_tokens, logits_indices}`, the interface
`SupportsEagle3`, whose `get_eagle3_default_aux_hidden_state_layers` a model may override.

Shape suffixes: N requests that draft, R rows of logits, A hidden states, K draft tokens.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rl_accel.errors import NotLiveError
from rl_accel.hosts.verl import RUN_ENV
from rl_accel.hosts.vllm.faults import Faults
from rl_accel.speculator.client import TrainerClient
from rl_accel.speculator.config import SpeculatorConfig
from rl_accel.speculator.flat import normalized
from rl_accel.speculator.head import HeadShape, first_weights
from rl_accel.speculator.hosts.cores import Cores, Turns
from rl_accel.speculator.hosts.tap import Step, Tap
from rl_accel.speculator.ledger import Ledger
from rl_accel.speculator.served import ServedHead
from rl_accel.speculator.state import state_file
from rl_accel.speculator.traces import RowLayout, aux_layers
from rl_accel.speculator.watch import ServedWatch

MAX_WIDTH = 512
AUX_ARGUMENT = "aux_hidden_states"
"""Of `propose_draft_token_ids`."""
OFF = "heads_off"
REFUSED, ROLLED_BACK, SILENT = "weights_refused", "rolled_back", "alarms"


class HeadSource:
    """A `CandidateSource` for the drafter."""

    def __init__(self, config: SpeculatorConfig, vllm_config: Any, faults: Faults):
        rank = getattr(vllm_config.parallel_config, "data_parallel_index", 0)
        self.config, self.faults = replace(config, state=state_file(config.state, rank)), faults
        model = vllm_config.model_config
        text = model.hf_text_config
        hidden, layers = int(text.hidden_size), int(text.num_hidden_layers)
        self.layers = aux_layers(layers)
        width = config.width or min(hidden, MAX_WIDTH)
        self.shape = HeadShape(int(model.get_vocab_size()), hidden, len(self.layers), width, 2 * width, config.history)
        self.layout = RowLayout(len(self.layers) * hidden, config.history + 1, self.shape.vocab_size)
        self.client: TrainerClient | None = None
        self.head: ServedHead | None = None
        self.watch = ServedWatch()
        self.tap: Tap | None = None
        self.version = 0
        self._flat: npt.NDArray[np.float32] | None = None  # folded, of the served version
        self._previous: tuple[int, npt.NDArray[np.float32]] | None = None
        self._refused_version = 0
        self._step: Step | None = None
        self._aux: list[torch.Tensor] | None = None
        self._rows: npt.NDArray[np.int64] | None = None
        self._cores, self._turns = Cores(), Turns()
        self.ledger = Ledger()
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
                self.poll()
                self._see_accepted(args[1])
            try:
                return inner_propose(*args, **kwargs)
            finally:
                self._step = self._aux = self._rows = None

        runner._sample, runner.propose_draft_token_ids = sample, propose

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
        embed = _weight(model, "embed_tokens")
        if embed is not None:
            embed = embed[: self.shape.vocab_size]  # vLLM pads the vocabulary
        flat = first_weights(self.shape, self.config.seed, embed)
        device = self.runner.device
        self.client = TrainerClient(self.shape, self.layout, self.config, flat)
        self.tap = Tap(self.runner, self.layout, self.client.ring, self.config.max_trace_share)
        self.version, folded, _ = self.client.slots.get()
        assert folded is not None
        self._flat = folded
        self.head = ServedHead(self.shape, torch.from_numpy(folded), device)
        self._drained = self.client.slots.read_report()
        self._drained_s = 0.0, 0.0
        if not self.config.learn:
            self.client.slots.allowed_share = 0.0  # the process is there for checkpoints only
        self.client.start()
        if self.config.trainer_tap and (run := os.environ.get(RUN_ENV)):
            self.client.tell("follow", run=run)
        if os.path.exists(self.config.state) and self.client.wait_ready():
            self.poll()  # the first requests get the head of the last run

    # Every step.

    @torch.inference_mode()
    def _see_logits(self, logits: torch.Tensor, metadata: Any) -> None:
        if self.head is None or self.tap is None:
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

    # What the drafter asks for.

    @property
    def ready(self) -> bool:
        return self.head is not None and self._rows is not None and self._aux is not None and not self.watch.silent

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
        drafts, paths = self.head.draft(aux, tokens, longest, min_probs, gain, self.watch.temperature)
        found = drafts.cpu().numpy(), paths.cpu().numpy()
        self._count("propose", started, 1)
        return found

    def observe(self, num_drafts: int, num_drafted: int, expected: float, num_accepted: int) -> None:
        """As `CandidateSource.observe`; goes back to the version before where this one does worse than it says."""
        verdict = self.watch.observe(num_drafts, num_drafted, expected, num_accepted)
        if verdict == "worse" and self._previous is not None:
            self._roll_back()
        elif verdict == "silent":
            self.faults.note(
                SILENT, "drafts of the speculator are hardly ever accepted; it is silent until its next version"
            )

    def observe_step(self, seconds: float, predicted: float, fixed: float, saved: float) -> None:
        """As `CandidateSource.observe_step`; the trainer trains as much as it earns, and when a core costs little."""
        if self.client is not None and self.config.learn:
            slots = self.client.slots
            self.ledger.observe_saved(saved)
            busy = slots.busy
            self.ledger.observe_step(seconds, predicted, busy)
            slots.allowed_share = self.ledger.share
            needs_cores = self._turns.needs_cores(seconds, predicted, fixed, busy)
            slots.paused = needs_cores and self._cores.free < self.config.threads

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
        return self.client is not None and self.client.alive and self.client.slots.allowed_share > 0.0

    def _count(self, what: str, started: float, calls: int) -> None:
        self._seconds[what] += time.perf_counter() - started
        self._calls[what] += calls


def _weight(model: Any, name: str) -> torch.Tensor | None:
    """Return the weight of a module of the policy on the CPU, None where it is not whole here."""
    for found, module in model.named_modules():
        if found.endswith(name):
            weight = getattr(module, "weight", None)
            if isinstance(weight, torch.Tensor) and weight.ndim == 2:
                return weight.detach().float().cpu()
    return None
