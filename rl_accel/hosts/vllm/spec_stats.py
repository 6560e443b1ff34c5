"""Counts what speculative decoding drafts and accepts, for every method and every rejection sampler of
vLLM's V1 runner.

Numbers that the host knows are added on the host; accepted and emitted tokens are summed on the device and
read only by `drain`, so counting never waits for the device. Cost: three small kernels and one copy of 2 B
integers per speculating step.

Host symbols (vLLM 0.28.0): `GPUModelRunner._sample`, `.discard_request_mask`,
`.input_batch.{num_reqs,vocab_size}`.

Shape suffixes: B requests, K longest draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d


class SpecDecodeCounter:
    """Running totals since the last `drain`."""

    def __init__(self, device: torch.device):
        with torch.inference_mode(False):
            self._accepted_emitted = torch.zeros(2, dtype=torch.int64, device=device)
        self._num_drafts = 0
        self._num_draft_tokens = 0

    def observe(
        self,
        output_token_ids_BK: torch.Tensor,
        num_draft_tokens: Sequence[int],
        discarded_B: np.ndarray,
        vocab_size: int,
    ) -> None:
        """Add one verification step.

        Args:
            output_token_ids_BK: integer [B, K + 1], the rejection sampler's output; ids outside [0,
                vocab_size) are padding.
            num_draft_tokens: B counts.
            discarded_B: bool [B], rows whose tokens vLLM throws away (prompts not yet prefilled to their
                end).
            vocab_size: of the target.
        """
        kept_B = ~np.asarray(discarded_B, dtype=bool)
        num_drafts_B = np.asarray(num_draft_tokens, dtype=np.int64) * kept_B
        drafted_B = num_drafts_B > 0
        self._num_drafts += int(drafted_B.sum())
        self._num_draft_tokens += int(num_drafts_B.sum())
        weights_2B = async_tensor_h2d(np.stack([drafted_B, kept_B]).astype(np.int64), output_token_ids_BK.device)
        valid_BK = (output_token_ids_BK >= 0) & (output_token_ids_BK < vocab_size)
        emitted_B = valid_BK.sum(dim=1)
        # A request that drafted emits its accepted tokens and one of the target's.
        self._accepted_emitted += (torch.stack([emitted_B - 1, emitted_B]) * weights_2B).clamp_(min=0).sum(dim=1)

    def drain(self) -> dict[str, int]:
        """Return the totals and start again from zero; waits for the device.

        Returns:
            `num_drafts`: (request, step) pairs with at least one draft token. `num_draft_tokens`,
            `num_accepted_tokens`: of those. `num_emitted_tokens`: all tokens that speculating steps emitted,
            also of requests without a draft in that step; steps without any draft do not count. Tokens
            behind a stop token, which vLLM cuts later, are in.
        """
        accepted, emitted = self._accepted_emitted.tolist()
        totals = {
            "num_drafts": self._num_drafts,
            "num_draft_tokens": self._num_draft_tokens,
            "num_accepted_tokens": accepted,
            "num_emitted_tokens": emitted,
        }
        self._accepted_emitted.zero_()
        self._num_drafts = self._num_draft_tokens = 0
        return totals


def install(runner: Any) -> SpecDecodeCounter:
    """Count every speculating step of a V1 model runner; warm-up does not pass `_sample`."""
    counter = SpecDecodeCounter(runner.device)
    inner_sample = runner._sample

    def sample(logits: torch.Tensor | None, spec_decode_metadata: Any) -> Any:
        output = inner_sample(logits, spec_decode_metadata)
        if spec_decode_metadata is not None:
            batch = runner.input_batch
            counter.observe(
                output.sampled_token_ids,
                spec_decode_metadata.num_draft_tokens,
                runner.discard_request_mask.np[: batch.num_reqs],
                batch.vocab_size,
            )
        return output

    runner._sample = sample
    return counter
