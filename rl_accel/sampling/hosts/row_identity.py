"""Whose token each logits row of a step samples: the request's key and the token's absolute position.

Positions come from the runner's own device tensor, `positions[logits_indices] + 1`, which is right for plain
and speculating steps, for requests resumed after preemption, and under async scheduling, where the host does
not know yet how many drafts of the last step were accepted. Rows of prompts that are still being prefilled
get an identity too; vLLM throws their tokens away. Cost: a dictionary look-up per request and two or four
small gathers a step.

Host symbols (vLLM 0.28.0): `GPUModelRunner.positions`, `.query_start_loc`, `.requests`,
`.input_batch.{req_ids,num_reqs}`; `CachedRequestState.{req_id,prompt_token_ids,sampling_params}`;
`SpecDecodeMetadata`.

Shape suffixes: B requests, T draft tokens of all requests, R = T + B logits rows of a speculating step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from rl_accel.errors import RLAccelError
from rl_accel.hosts.vllm.faults import Faults
from rl_accel.hosts.vllm.request_identity import identity_of
from rl_accel.identity import hash64
from rl_accel.sampling.keys import request_key

MAX_CHILD_DIGITS = 5
"""Of the index of a child; vLLM bounds n at 16,384 (`VLLM_MAX_N_SEQUENCES`)."""


@dataclass(frozen=True)
class StepRows:
    """Whose token each logits row of a step samples. int64 on the device; no T part in plain steps."""

    keys_B: torch.Tensor
    positions_B: torch.Tensor
    """Of the plain rows, or of the bonus rows behind the drafts."""
    keys_T: torch.Tensor | None = None
    positions_T: torch.Tensor | None = None
    request_T: torch.Tensor | None = None
    """Index into the B part."""


class RowSource:
    """Hands the rows of the current step from `_sample` to the samplers below."""

    def __init__(self) -> None:
        self.step: StepRows | None = None

    @contextmanager
    def of(self, step: StepRows) -> Iterator[None]:
        """Make `step` the current one inside a with block."""
        self.step = step
        try:
            yield
        finally:
            self.step = None

    def get(self) -> StepRows:
        if self.step is None:
            raise RLAccelError("exact sampling: a sampler was called outside of _sample, so its rows have no identity")
        return self.step


def key_of(request: Any, seed: int, faults: Faults) -> int:
    """Return the key of a vLLM request (`CachedRequestState`), computed once and kept on it.

    Our requests carry an identity (`rl_accel/identity.py`); child i of a request with n > 1 is sample
    `sample_index + i`. Anonymous requests are named by their own seed and prompt if they have a seed (vLLM gives
    child i the seed + i), else by their id, which vLLM makes unique: equal prompts without a seed must get
    independent samples, as in stock vLLM, and so are not repeatable either.
    """
    try:
        return request.rl_accel_key
    except AttributeError:
        key = request.rl_accel_key = _new_key(request, seed, faults)
        return key


def _new_key(request: Any, seed: int, faults: Faults) -> int:
    identity = identity_of(request, faults)
    if identity is not None:
        return request_key(
            seed,
            identity.problem_id,
            identity.sample_index + _child_index(request.req_id),
            identity.step,
            identity.validate,
            identity.call,
        )
    own_seed = request.sampling_params.seed
    name = f"{seed}/id/{request.req_id}" if own_seed is None else f"{seed}/seed/{own_seed}"
    prompt = np.asarray(request.prompt_token_ids or [], dtype=np.int64)
    return hash64(name.encode(errors="surrogatepass") + b"\0" + prompt.tobytes())


def _child_index(req_id: str) -> int:
    """Return i for the id `i_parent` that v1/engine/parallel_sampling.py gives to child i, else 0."""
    prefix, underscore, _ = req_id.partition("_")
    return int(prefix) if underscore and len(prefix) <= MAX_CHILD_DIGITS and prefix.isdecimal() else 0


def rows_of_step(runner: Any, metadata: SpecDecodeMetadata | None, seed: int) -> StepRows:
    """Name the rows that `runner._sample` is about to sample; logits at position i sample token i + 1."""
    batch = runner.input_batch
    requests, faults = runner.requests, runner.rl_accel_faults
    keys_B = np.array([key_of(requests[rid], seed, faults) for rid in batch.req_ids[: batch.num_reqs]], np.int64)
    if metadata is None:
        logits_indices_B = runner.query_start_loc.gpu[1 : batch.num_reqs + 1] - 1
        return StepRows(async_tensor_h2d(keys_B, runner.device), runner.positions[logits_indices_B] + 1)
    request_T = np.repeat(np.arange(batch.num_reqs), metadata.num_draft_tokens)
    positions_R = runner.positions[metadata.logits_indices] + 1
    return StepRows(
        keys_B=async_tensor_h2d(keys_B, runner.device),
        positions_B=positions_R[metadata.bonus_logits_indices],
        keys_T=async_tensor_h2d(keys_B[request_T], runner.device),
        positions_T=positions_R[metadata.target_logits_indices],
        request_T=async_tensor_h2d(request_T, runner.device),
    )
