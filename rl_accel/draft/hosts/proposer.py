"""DAS as a proposer of vLLM: `speculative_config={"model": "rl_accel.draft.hosts.proposer.DASProposer", ...}`.

vLLM tells a custom proposer neither request ids nor sampling parameters, moves rows between steps, leaves rows of
unfinished prompts empty, and does not call it at all while any request is within a draft of `max_model_len`. So the
proposer reads the model runner that `plugin.install` gives it: state is keyed by request id, texts are read from the
runner's token table from where they were last seen, and requests that the runner has forgotten have ended or were
aborted; preempted ones it still knows. Problems come from `extra_args["rl_accel"]`, else from the prompt.

Only the tensor-parallel rank whose output vLLM uses drafts; the others answer with empty rows, so there is nothing to
keep equal. Async scheduling is off for every custom proposer (vLLM decides that).
Cost: 0.5 to 2.5 ms a step in all, measured with up to 128 requests on two busy CPU cores (`rl_accel/draft/propose_ms`).

Host symbols (vLLM 0.28.0): `SpeculativeConfig.model` with a dotted path; the caller's arguments of `propose`;
`GPUModelRunner.{requests,input_batch}`, `InputBatch.{req_ids,num_prompt_tokens}`; `CPUModelRunner.load_model` calls
`drafter.load_model`; `CompilationConfig.cudagraph_capture_sizes`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from rl_accel.config import build
from rl_accel.draft.combined import CombinedDrafter
from rl_accel.draft.config import HEAD_METHODS, SOURCE_METHODS, DraftConfig
from rl_accel.draft.drafter import SuffixDrafter
from rl_accel.draft.hints import Hints
from rl_accel.errors import DraftError, NotLiveError
from rl_accel.hosts.vllm.faults import MALFORMED, Faults
from rl_accel.hosts.vllm.ranks import is_output_rank
from rl_accel.hosts.vllm.request_identity import identity_of

logger = logging.getLogger(__name__)

FOREIGN_EPOCH_TOKENS = 1 << 17
"""Response tokens of requests without identity after which an epoch is closed: serving has none of its own. Closing
takes about 0.2 us a token."""
UNDRAFTED = "undrafted_requests"
"""Requests for which the drafter failed; they go on without drafts and are not learned from."""
DRAFTING_OFF = "engines_off"
"""1 once the drafter has failed as a whole, so that the engine goes on without it."""


class DASProposer:
    """Glue between vLLM's model runner and `SuffixDrafter`. Settings: `additional_config["rl_accel"]["draft"]`."""

    def __init__(self, vllm_config: Any):
        self.vllm_config = vllm_config
        settings = (getattr(vllm_config, "additional_config", None) or {}).get("rl_accel") or {}
        draft = {"method": "das", **settings.get("draft", {})}
        draft["num_speculative_tokens"] = vllm_config.speculative_config.num_speculative_tokens
        self.config = build(DraftConfig, draft, "rl_accel.draft")
        self.max_model_len = vllm_config.model_config.max_model_len
        self.runner: Any = None
        self.source: Any = None
        self.drafter: SuffixDrafter | None = None
        self._keep_in_history: dict[str, bool] = {}
        self._anonymous: set[str] = set()
        self._foreign_tokens = 0
        self._undrafted: set[str] = set()
        """Live requests without drafts; they are not in `_keep_in_history`."""
        self.faults = Faults()
        self.hints = Hints(0)
        self._last_start: float | None = None
        self._last_ids: list[str] = []
        self._last_drafted = 0
        self._asked = False
        """Whether vLLM has asked for drafts since it last took them."""
        self._propose_s, self._steps = 0.0, 0

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """There is no draft model, but this is where vLLM would load it: `attach` has been called by then, or never is.

        Raises:
            NotLiveError: if rl_accel's plug-in did not run in this process.
        """
        if self.runner is None:
            raise NotLiveError(
                "the DAS proposer was not attached to its model runner; rl_accel's plug-in of the group "
                "vllm.general_plugins must be installed and not filtered by VLLM_PLUGINS"
            )
        if self.source is not None:
            self.source.load(args[0] if args else kwargs["target_model"])

    def attach(self, runner: Any, source: Any = None) -> None:
        """Bind to the model runner; only the rank whose drafts vLLM uses gets an index.

        Args:
            source: a `CandidateSource` to ask beside history, for the methods `head`, `auto` and `ahead`.

        Raises:
            NotLiveError: if the method needs one and there is none.
        """
        self.runner, self.faults, self.source = runner, runner.rl_accel_faults, source
        self.hints.vocab_size = self.vllm_config.model_config.get_vocab_size()
        if self.config.method in HEAD_METHODS and source is None:
            raise NotLiveError(
                f"rl_accel.draft.method={self.config.method} needs rl_accel.speculator, which is off here"
            )
        if not is_output_rank(self.vllm_config):
            return
        self.drafter = self._new_drafter()
        self.drafter.capture_sizes = _capture_sizes(self.vllm_config)
        take_drafts = runner.take_draft_token_ids

        def take_draft_token_ids() -> Any:
            """The step's drafts, None without any: the scheduler need not look through its requests for them then."""
            asked, self._asked = self._asked, False
            if not asked:
                # vLLM's own answer would be a draft of zeros as long as can be for every request. And the time to the
                # next call is not that of a step.
                self._last_start = None
                return None
            return take_drafts() if self._last_drafted else None

        runner.take_draft_token_ids = take_draft_token_ids

    def _new_drafter(self) -> SuffixDrafter:
        if self.config.method in SOURCE_METHODS:
            return CombinedDrafter(self.config, self.source, **self._identity_of_tokenizer())
        return SuffixDrafter(self.config, **self._identity_of_tokenizer())

    def _identity_of_tokenizer(self) -> dict[str, Any]:
        return {
            "tokenizer": tokenizer_fingerprint(self.vllm_config.model_config),
            "stop_token_ids": stop_token_ids(self.vllm_config.model_config),
        }

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Return a draft per row of the batch, maybe empty.

        Args:
            sampled_token_ids: per row what this step sampled; empty for a prompt that is not finished.
            num_tokens_no_spec: int [rows], tokens of each row.
            token_ids_cpu: int32 [rows, max_model_len], the texts.
            slot_mappings: not used.
        """
        started = time.perf_counter()
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        self._asked = True
        if self.drafter is None:
            return drafts
        try:
            self._draft_into(drafts, started, sampled_token_ids, num_tokens_no_spec, token_ids_cpu)
        except Exception as error:  # whatever fails in here, the engine's tokens do not need it
            self._turn_off(error)
            drafts = [[] for _ in sampled_token_ids]
        return drafts

    def _draft_into(
        self,
        drafts: list[list[int]],
        started: float,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
    ) -> None:
        batch = self.runner.input_batch
        ids = batch.req_ids[: len(sampled_token_ids)]
        self._end_gone()
        sampled = [row for row, tokens in enumerate(sampled_token_ids) if tokens]
        fresh = [row for row in sampled if ids[row] not in self._keep_in_history and ids[row] not in self._undrafted]
        for row in fresh:
            self._begin(ids[row], token_ids_cpu[row, : batch.num_prompt_tokens[row]])
        rows = [row for row in sampled if ids[row] in self._keep_in_history]
        row_ids = [ids[row] for row in rows]
        self._time_pass(started, row_ids, steady=not fresh and len(rows) == len(sampled_token_ids))
        if rows:
            where = np.array(rows, np.uint32)
            lengths = np.ascontiguousarray(num_tokens_no_spec[where], np.uint32)
            for row, draft in zip(rows, self._ask(row_ids, token_ids_cpu, where, lengths), strict=True):
                drafts[row] = draft
            self._offer_hints(drafts, ids, rows, num_tokens_no_spec, token_ids_cpu)
        self._last_drafted = sum(map(len, drafts))
        self._last_start, self._last_ids = started, row_ids
        self._propose_s += time.perf_counter() - started
        self._steps += 1

    def _offer_hints(
        self, drafts: list[list[int]], ids: list[str], rows: list[int], num_tokens: np.ndarray, token_ids: np.ndarray
    ) -> None:
        """Let the hint of a request stand before what else would be drafted."""
        for row in rows:
            if ids[row] in self.hints:
                hint = self.hints.draft(ids[row], token_ids[row, : num_tokens[row]], self.config.max_draft)
                drafts[row] = hint or drafts[row]

    def _ask(
        self, names: list[str], token_ids: np.ndarray, rows: np.ndarray, num_tokens: np.ndarray
    ) -> list[list[int]]:
        """Return a draft per row. The index refuses a call as a whole: then each row by itself, to find which."""
        assert self.drafter is not None
        try:
            return self.drafter.propose_rows(names, token_ids, rows, num_tokens)
        except DraftError as error:
            if len(names) == 1:
                self._leave_out(names[0], error)
                return [[]]
        return [self._ask([name], token_ids, rows[i : i + 1], num_tokens[i : i + 1])[0] for i, name in enumerate(names)]

    def _begin(self, name: str, prompt_token_ids: np.ndarray) -> None:
        """Start drafting for a request, or leave it out: its text is not all tokens, or the drafter refuses it."""
        assert self.drafter is not None
        request = self.runner.requests[name]
        if request.prompt_token_ids is None or request.prompt_is_token_ids is not None:
            self._undrafted.add(name)  # embeddings
            return
        params, identity = request.sampling_params, identity_of(request, self.faults)
        if identity is None:
            problem, keep = "prompt/" + hashlib.blake2b(prompt_token_ids.tobytes(), digest_size=12).hexdigest(), True
        else:
            # Validation that is not kept has texts of its own, out of reach of a training rollout.
            keep = not identity.validate or self.config.learn_from_validation
            problem = ("problem/" if keep else "validation/") + identity.problem_id
        remaining = self.max_model_len - len(prompt_token_ids)
        max_tokens = remaining if params is None or params.max_tokens is None else min(params.max_tokens, remaining)
        try:
            self.drafter.begin(name, problem, prompt_token_ids, max_tokens)
        except DraftError as error:
            self._leave_out(name, error)
            return
        self._keep_in_history[name] = keep
        self._take_hint(name, len(prompt_token_ids), max_tokens, params)
        if identity is None:
            self._anonymous.add(name)

    def _take_hint(self, name: str, num_prompt_tokens: int, max_tokens: int, params: Any) -> None:
        try:
            self.hints.begin(name, num_prompt_tokens, getattr(params, "extra_args", None), max_tokens)
        except ValueError as error:
            self.faults.note(MALFORMED, "request %.60s is served without its hint", ascii(name), error=error)
        if name in self.hints:
            # With the prompt, by `first_step.py`; vLLM pads such a draft with tokens that are none.
            spoken = self.runner.requests[name].prev_num_draft_len
            self.hints.num_offered += min(spoken, self.hints.length(name))

    def _leave_out(self, name: str, error: DraftError) -> None:
        """Go on without drafts for one request, and forget what it said."""
        assert self.drafter is not None
        self.faults.note(UNDRAFTED, "request %.60s goes on without drafts", ascii(name), error=error)
        self._undrafted.add(name)
        self._keep_in_history.pop(name, None)
        self._anonymous.discard(name)
        self.hints.end(name)
        if name in self.drafter:
            self.drafter.end(name, keep=False)

    def _turn_off(self, error: Exception) -> None:
        """The drafter itself is broken: plain decoding from now on, which samples the same tokens."""
        self.faults.note(DRAFTING_OFF, "the drafter failed, the engine goes on without drafts", error=error)
        self.drafter, self._last_drafted = None, 0
        self._keep_in_history, self._anonymous, self._undrafted = {}, set(), set()

    def _end_gone(self) -> None:
        """End what the runner no longer knows."""
        assert self.drafter is not None
        if not self._keep_in_history.keys() <= self.runner.requests.keys():
            gone = self._keep_in_history.keys() - self.runner.requests.keys()
            for name in sorted(gone):  # a set has no order, and history should not depend on hashing
                self._end(name)
        if self._undrafted:
            self._undrafted &= self.runner.requests.keys()
        if self._foreign_tokens >= FOREIGN_EPOCH_TOKENS:
            self._foreign_tokens = 0
            self.drafter.close_epoch(self.drafter.epoch)

    def _end(self, name: str) -> None:
        assert self.drafter is not None
        self.hints.end(name)
        if name in self._anonymous:
            self._anonymous.discard(name)
            self._foreign_tokens += self.drafter.num_generated(name)
        self.drafter.end(name, self._keep_in_history.pop(name))

    def _end_done(self) -> None:
        """Between steps: end also what is complete and of which the runner will be told with the next step only."""
        self._end_gone()
        stops = set(stop_token_ids(self.vllm_config.model_config))
        for name in sorted(self._keep_in_history):
            request = self.runner.requests[name]
            params, tokens = request.sampling_params, request.output_token_ids
            if params is None or not tokens:
                continue
            stopped = not params.ignore_eos and not stops.isdisjoint(tokens[-self.config.max_draft - 1 :])
            if stopped or (params.max_tokens is not None and len(tokens) >= params.max_tokens):
                self._end(name)

    def _time_pass(self, started: float, ids: list[str], steady: bool) -> None:
        """A step took from one call to the next, if the same requests ran on and no prompt was processed."""
        assert self.drafter is not None
        if self._last_start is None or not steady or not ids:
            return
        if ids == self._last_ids or set(ids) <= set(self._last_ids):
            self.drafter.observe_step(started - self._last_start, len(ids), self._last_drafted)

    def close_epoch(self, epoch: int, policy_version: int, share: bool = False) -> dict[str, Any]:
        """End what has ended and close the epoch; with `share`, `take_segment` will be asked for what is new."""
        if self.drafter is None:
            return {}
        self._end_done()
        self._last_start = None
        info = self.drafter.close_epoch(epoch, policy_version)
        if not share:
            self.drafter.index.share_with_nobody()
        return info

    def take_segment(self) -> bytes:
        """Return rollouts that other engines have not been given yet, packed; b"" if there are none."""
        return b"" if self.drafter is None else self.drafter.index.take_unshared()

    def add_segment(self, segment: bytes) -> bool:
        """Take rollouts of another engine. A damaged segment is left out, and said."""
        if self.drafter is None:
            return False
        try:
            self.drafter.index.add_segment(segment)
        except (DraftError, MemoryError) as error:
            logger.error("rl_accel: a segment of another engine is left out: %s", error)
            return False
        return True

    def save(self, path: str) -> dict[str, Any]:
        """Write a snapshot of the history to `path`, a data-parallel rank beside it under a name of its own.

        Returns:
            `{"path": str}`, with `{"error": str}` where it could not be written: the history only makes rollouts
            faster, so that stops nobody. Empty on ranks without history.
        """
        if self.drafter is None:
            return {}
        path = self._own(path)
        try:
            self._end_done()
            self._last_start = None
            self.drafter.save(path)
        except (DraftError, OSError, MemoryError) as error:
            return {"path": path, "error": str(error) or repr(error)}
        return {"path": path}

    def open(self, path: str) -> dict[str, Any]:
        """Replace the history by a snapshot's.

        Returns:
            `{"restored": True, "tokens": int}`, or `{"restored": False, "reason": str}` where the snapshot is refused:
            drafting then starts without history, which costs speed and nothing else.
        """
        if self.drafter is None:
            return {}
        try:
            own = self._own(path)
            drafter = self._new_drafter()
            drafter.restore(own if os.path.exists(own) else path)
        except (DraftError, MemoryError) as error:
            logger.error("rl_accel: history is not restored, drafting starts without it: %s", error)
            return {"restored": False, "reason": str(error) or repr(error)}
        drafter.capture_sizes = self.drafter.capture_sizes
        self.drafter, self._keep_in_history, self._anonymous = drafter, {}, set()
        return {"restored": True, "tokens": sum(s["num_tokens"] for s in drafter.index.segments())}

    def _own(self, path: str) -> str:
        rank = getattr(self.vllm_config.parallel_config, "data_parallel_index", 0)
        return f"{path}-rank{rank:03d}" if rank else path

    def drain_metrics(self) -> dict[str, float]:
        """Return what happened since the last call, by name and unit of `docs/metrics.md`."""
        if self.drafter is None:
            return {}
        self._end_done()
        drafter, memory = self.drafter, self.drafter.memory_bytes()
        cost = drafter.planner.cost
        metrics = {
            "propose_ms": 1e3 * self._propose_s / max(self._steps, 1),
            "num_steps": float(self._steps),
            "base_ms": 1e3 * cost.base_s,
            "speculation_ms": 1e3 * cost.speculation_s,
            "per_request_us": 1e6 * cost.per_request_s,
            "per_draft_us": 1e6 * cost.per_draft_s,
            "cost_error": cost.relative_error,
            "window": float(drafter.window),
            "hinted_tokens": float(self.hints.take_offered()),
            "live_bytes": float(memory["live"]),
            "closed_bytes": float(memory["closed"]),
            "global_bytes": float(memory["global"]),
            "lengths_bytes": float(memory["lengths"]),
            **{name: float(count) for name, count in drafter.take_given_up().items()},
        }
        for (source, _), (_, drafted, accepted) in drafter.take_source_stats().items():
            for what, value in (("drafted", drafted), ("accepted", accepted)):
                name = f"{what}_by_{source}"
                metrics[name] = metrics.get(name, 0.0) + float(value)
        self._propose_s, self._steps = 0.0, 0
        return metrics


def tokenizer_fingerprint(model_config: Any) -> int:
    """Return 63 bits that tell tokenizers apart: of its files where they can be read, else of its name and size."""
    digest = hashlib.blake2b(digest_size=8)
    name = str(model_config.tokenizer)
    files = [Path(name) / file for file in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")]
    found = [file for file in files if file.is_file()]
    for file in found:
        digest.update(file.read_bytes())
    if not found:
        digest.update(name.encode())
    digest.update(str(model_config.get_vocab_size()).encode())
    return int.from_bytes(digest.digest(), "little") >> 1


def stop_token_ids(model_config: Any) -> list[int]:
    """Return the tokens that end a text of this model, ascending."""
    stops = getattr(model_config.hf_text_config, "eos_token_id", None)
    generation = model_config.try_get_generation_config().get("eos_token_id")
    found: set[int] = set()
    for value in (stops, generation):
        found.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return sorted(int(token) for token in found)


def _capture_sizes(vllm_config: Any) -> np.ndarray:
    """Token counts of the captured CUDA graphs: a step is padded to the next one, so up to it drafts are free."""
    sizes = getattr(vllm_config.compilation_config, "cudagraph_capture_sizes", None) or []
    if vllm_config.device_config.device_type != "cuda" or vllm_config.model_config.enforce_eager:
        sizes = []
    return np.array(sorted(sizes), np.uint32)
