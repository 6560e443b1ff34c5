"""Repair of `allowed_token_ids` in vLLM's V1 runner, where a request can be given the mask of another one.

The patches are applied only to an engine with rl_accel on, and only those whose probe finds the bug. Cost: nothing
until a request asks for `allowed_token_ids`; from then on one row of the mask per request that is added.

Host symbols (vLLM 0.28.0): `vllm.v1.worker.gpu_input_batch.InputBatch.{add_request, remove_request, condense,
swap_states, allowed_token_ids_mask_cpu_tensor, batch_update_builder}`, `CachedRequestState`.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.worker import gpu_input_batch
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from rl_accel.patching import HostPatch

logger = logging.getLogger(__name__)

_VOCAB_SIZE = 4


class ClearReusedMaskPatch(HostPatch):
    """Clears the mask of a row that is given to a request without `allowed_token_ids`.

    `condense` copies the mask of a request that moves down and leaves it in the row that it came from, and
    `add_request` writes a mask only for a request that asks for one. So a request that is given such a row samples
    from the tokens of another one, as long as any request with `allowed_token_ids` runs.
    """

    target = "vllm.v1.worker.gpu_input_batch:InputBatch.add_request"
    parameters = ("self", "request")
    issue = "https://github.com/vllm-project/vllm/issues/43894"
    versions = "vllm 0.28.0; applied wherever the probe finds the bug"

    @staticmethod
    def is_broken() -> bool:
        """Move a request with a mask down, and put one without into the row that it left."""
        batch = _batch(_request("a"), _request("b", allowed=[1]), _request("c", allowed=[2]))
        batch.remove_request("a")
        batch.condense()
        row = batch.add_request(_request("d"))
        return bool(_mask(batch)[row].any())

    @classmethod
    def replace(cls, module: Any) -> None:
        add_request = module.InputBatch.add_request

        @functools.wraps(add_request)
        def add_with_its_own_mask(self: InputBatch, request: CachedRequestState) -> int:
            row = add_request(self, request)
            mask = self.allowed_token_ids_mask_cpu_tensor
            if mask is not None and not getattr(request.sampling_params, "allowed_token_ids", None):
                mask[row] = False
            return row

        module.InputBatch.add_request = add_with_its_own_mask


class SwapMasksPatch(HostPatch):
    """Keeps the first of two masks that `swap_states` exchanges.

    It assigns the rows of a tensor to each other, which are views, so that both end as the second. Attention backends
    that put decodes before prefills call it in every mixed batch.
    """

    target = "vllm.v1.worker.gpu_input_batch:InputBatch.swap_states"
    parameters = ("self", "i1", "i2")
    issue = "https://github.com/vllm-project/vllm/pull/48419"
    versions = "vllm 0.28.0; applied wherever the probe finds the bug"

    @staticmethod
    def is_broken() -> bool:
        """Swap two requests with different masks."""
        batch = _batch(_request("a", allowed=[1]), _request("b", allowed=[2]))
        before = _mask(batch)[:2].clone()
        batch.swap_states(0, 1)
        return not torch.equal(_mask(batch)[:2], before.flip(0))

    @classmethod
    def replace(cls, module: Any) -> None:
        swap_states = module.InputBatch.swap_states

        @functools.wraps(swap_states)
        def swap_with_masks(self: InputBatch, i1: int, i2: int) -> None:
            mask = self.allowed_token_ids_mask_cpu_tensor
            first = None if mask is None else mask[i1].clone()
            swap_states(self, i1, i2)
            if mask is not None:
                mask[i2] = first

        module.InputBatch.swap_states = swap_with_masks


PATCHES = (ClearReusedMaskPatch, SwapMasksPatch)
_applied: list[str] = []


def repair_if_needed() -> list[str]:
    """Apply, in this process, the patches whose probe finds the bug; return the symbols that are repaired."""
    for patch in PATCHES:
        if patch.is_broken():
            patch.apply(gpu_input_batch)
            _applied.append(patch.target)
            logger.info("rl_accel repaired %s (%s)", patch.target, patch.issue)
    return list(_applied)


def _request(name: str, allowed: list[int] | None = None) -> CachedRequestState:
    params = SamplingParams(allowed_token_ids=allowed)
    return CachedRequestState(name, [1], [], params, None, ([],), 0, [])


def _batch(*requests: CachedRequestState) -> InputBatch:
    batch: Any = InputBatch(
        max_num_reqs=len(requests),
        max_model_len=4,
        max_num_batched_tokens=4,
        device=torch.device("cpu"),
        vocab_size=_VOCAB_SIZE,
        block_sizes=[4],
        kernel_block_sizes=[4],
        max_num_blocks_per_req=[1],
    )
    for request in requests:
        batch.add_request(request)
    batch.refresh_metadata()  # forgets which rows are new, as after a step
    return batch


def _mask(batch: InputBatch) -> torch.Tensor:
    assert batch.allowed_token_ids_mask_cpu_tensor is not None
    return batch.allowed_token_ids_mask_cpu_tensor
