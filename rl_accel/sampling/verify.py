"""Verification of one-token drafts against tokens sampled from the target: compare, and cut at the first
difference.

If the target samples x from p and the draft d is accepted exactly when x == d, the draft is accepted with
probability p(d), as rejection sampling accepts a deterministic draft (Leviathan et al. 2023, q a point
mass), and the emitted token is x, distributed as p. So no second random number, no residual distribution, and
nothing lost in acceptance.

Left out: drafts that were themselves sampled from a draft model; they need standard rejection sampling.
Cost: O(B * K) memory and time, one host-to-device copy, no device-to-host synchronization.

Shape suffixes: B requests, K max_spec_len, T draft tokens of all requests together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

PLACEHOLDER_TOKEN_ID = -1
"""Fills the slots behind the last emitted token, as in vLLM's v1/sample/rejection_sampler.py."""


def verify_drafts(
    target_tokens_T: torch.Tensor,
    draft_tokens_T: torch.Tensor,
    num_draft_tokens: Sequence[int],
    bonus_tokens_B: torch.Tensor,
    max_spec_len: int,
) -> torch.Tensor:
    """Return what each request emits: the accepted drafts, then one token of the target.

    Args:
        target_tokens_T: integer [T], the target's sample at the place of every draft token, requests one
            after another.
        draft_tokens_T: integer [T], draft tokens in the same order; -1 is never accepted.
        num_draft_tokens: B counts on the host, summing to T; zero is allowed.
        bonus_tokens_B: integer [B] or [B, 1], the target's sample behind the last draft token.
        max_spec_len: K, at least the largest count.

    Returns:
        int32 [B, K + 1] on the tensors' device, padded with -1.

    Raises:
        ValueError: if the shapes do not fit the counts.
    """
    num_drafts_B = np.asarray(num_draft_tokens, dtype=np.int64)
    batch_size, total = len(num_drafts_B), int(num_drafts_B.sum())
    _check(target_tokens_T, draft_tokens_T, num_drafts_B, bonus_tokens_B, max_spec_len)

    device, width = target_tokens_T.device, max_spec_len + 1
    row_starts_B = np.arange(batch_size, dtype=np.int64) * width
    first_B = np.cumsum(num_drafts_B) - num_drafts_B
    slots_T = np.arange(total) + np.repeat(row_starts_B - first_B, num_drafts_B)
    slots = torch.from_numpy(np.concatenate([slots_T, row_starts_B + num_drafts_B]))
    if device.type == "cuda":
        slots = slots.pin_memory()
    slots = slots.to(device, non_blocking=True)

    tokens_BK = torch.full((batch_size * width,), PLACEHOLDER_TOKEN_ID, dtype=torch.int32, device=device)
    tokens_BK[slots] = torch.cat([target_tokens_T, bonus_tokens_B.reshape(-1)]).to(torch.int32)
    agrees_BK = torch.zeros(batch_size * width, dtype=torch.int32, device=device)
    agrees_BK[slots[:total]] = (target_tokens_T == draft_tokens_T).to(torch.int32)

    num_accepted_B1 = agrees_BK.view(batch_size, width).cumprod(dim=1).sum(dim=1, keepdim=True)
    behind_cut_BK = torch.arange(width, device=device) > num_accepted_B1
    return tokens_BK.view(batch_size, width).masked_fill_(behind_cut_BK, PLACEHOLDER_TOKEN_ID)


def _check(
    target_tokens_T: torch.Tensor,
    draft_tokens_T: torch.Tensor,
    num_drafts_B: np.ndarray,
    bonus_tokens_B: torch.Tensor,
    max_spec_len: int,
) -> None:
    total = int(num_drafts_B.sum())
    if target_tokens_T.shape != (total,) or draft_tokens_T.shape != (total,):
        raise ValueError(
            f"num_draft_tokens sums to {total}; expected that many target and draft tokens, got "
            f"{tuple(target_tokens_T.shape)} and {tuple(draft_tokens_T.shape)}"
        )
    if bonus_tokens_B.numel() != len(num_drafts_B):
        raise ValueError(
            f"expected one bonus token for each of {len(num_drafts_B)} requests, got shape "
            f"{tuple(bonus_tokens_B.shape)}"
        )
    if num_drafts_B.size and (num_drafts_B.min() < 0 or num_drafts_B.max() > max_spec_len):
        raise ValueError(
            f"expected 0 to max_spec_len={max_spec_len} draft tokens per request, got "
            f"{num_drafts_B.min()} to {num_drafts_B.max()}"
        )
