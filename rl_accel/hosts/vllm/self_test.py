"""Self-test without which rl_accel does not speculate: do speculative tokens follow the target distribution?

Run once at engine start, on every platform. It asks the very functions that the engine will use for a few
thousand tokens under adversarial drafts. Its random numbers are fixed and the global generators are restored, so
it gives the same answer every time and disturbs nothing. Left out: bonus tokens, which come from the plain
sampler, and draft models with probabilities. Cost: about 0.2 s on CPU.

Host symbols: `vllm.v1.sample.rejection_sampler.{expand_batch_to_tokens, apply_sampling_constraints,
rejection_sample}`; `SpecDecodeMetadata.make_dummy`; `SamplingMetadata`.

Shape suffixes: B requests, T draft tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from vllm.v1.sample import rejection_sampler as vllm_rejection
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from rl_accel.errors import SpeculationUnsafeError
from rl_accel.lossless import chi_square, count_tokens

NUM_REQUESTS = 2000
"""Requests of two draft tokens per adversarial draft; finds a total-variation distance of about 0.1."""
LOGITS = (1.5, 1.0, 0.6, 0.2, -0.1, -0.4, -0.6, -4.0)
TEMPERATURE, TOP_K, TOP_P = 0.7, 6, 0.95
ADVERSARIAL_DRAFTS = (0, 5, 7)
"""The likeliest token, one that top-p removes, one that top-k removes."""


def self_test(rejection_sampler: RejectionSampler, device: torch.device) -> None:
    """Check that speculative decoding samples from the target; global random state is left as found.

    Args:
        rejection_sampler: the one that the engine will use, vLLM's or ours.
        device: of the engine.

    Raises:
        SpeculationUnsafeError: with what failed.
    """
    _check_expansion(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.inference_mode():
        torch.manual_seed(0)
        for draft_token in ADVERSARIAL_DRAFTS:
            _check_distribution(_sample(rejection_sampler, draft_token, device), draft_token)


def sampling_metadata(
    temperature_B: torch.Tensor, top_k_B: torch.Tensor | None, top_p_B: torch.Tensor | None
) -> SamplingMetadata:
    """Return vLLM's description of a batch of random requests without penalties, masks or log-probs.

    Args:
        temperature_B: float32 [B], positive.
        top_k_B: int32 [B] or None.
        top_p_B: float32 [B] or None.
    """
    none_needed = torch.empty(0, device=temperature_B.device)
    return SamplingMetadata(
        temperature=temperature_B,
        all_greedy=False,
        all_random=True,
        top_p=top_p_B,
        top_k=top_k_B,
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=none_needed,
        presence_penalties=none_needed,
        repetition_penalties=none_needed,
        output_token_ids=[],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )


def target_distribution(logits_V: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Return float64 [V] by definition: of the top_k largest logits, the fewest that hold top_p."""
    logits_V = logits_V.double() / temperature
    order = logits_V.argsort(descending=True)[:top_k]
    probs = logits_V[order].softmax(dim=0)
    kept = probs.cumsum(dim=0) - probs < top_p
    probs_V = torch.zeros_like(logits_V)
    probs_V[order[kept]] = probs[kept]
    return probs_V / probs_V.sum()


def _check_expansion(device: torch.device) -> None:
    """Values differ from case to case, so that memory left by one case cannot pass for the next."""
    cases = (([2, 3, 1], [3, 0, 9]), ([0, 1, 0, 3], [4, 5, 6, 0]), ([3, 0, 0, 3], [7, 8, 0, 2]))
    for dtype in (torch.float32, torch.int32, torch.int64):
        for counts, values in cases:
            replaced = [value or 11 for value in values]
            expected = [value for value, n in zip(replaced, counts, strict=True) for _ in range(n)]
            ends = torch.tensor(counts).cumsum(0).to(device, torch.int32)
            x_B = torch.tensor(values, dtype=dtype, device=device)
            got = vllm_rejection.expand_batch_to_tokens(x_B, ends, len(expected), 0, 11).tolist()
            if got != expected:
                raise SpeculationUnsafeError(
                    f"vLLM's expand_batch_to_tokens, {dtype}: expected {expected}, got {got}; draft places "
                    "would get wrong temperatures. Turn speculative decoding off, or report this"
                )


def _sample(rejection_sampler: RejectionSampler, draft_token: int, device: torch.device) -> torch.Tensor:
    """Return int32 [B, 3], what the engine's own functions emit for two drafts of `draft_token`."""
    logits_V = torch.tensor(LOGITS, device=device)
    metadata = SpecDecodeMetadata.make_dummy([[draft_token, draft_token]] * NUM_REQUESTS, device)
    batch = sampling_metadata(
        torch.full((NUM_REQUESTS,), TEMPERATURE, device=device),
        torch.full((NUM_REQUESTS,), TOP_K, dtype=torch.int32, device=device),
        torch.full((NUM_REQUESTS,), TOP_P, device=device),
    )
    logits_TV = vllm_rejection.apply_sampling_constraints(
        logits_V.repeat(2 * NUM_REQUESTS, 1), metadata.cu_num_draft_tokens, batch
    )
    bonus_B1 = torch.zeros(NUM_REQUESTS, 1, dtype=torch.int32, device=device)
    if not hasattr(rejection_sampler, "verify_for_self_test"):
        return vllm_rejection.rejection_sample(
            metadata.draft_token_ids,
            metadata.num_draft_tokens,
            metadata.max_spec_len,
            metadata.cu_num_draft_tokens,
            None,
            logits_TV,
            bonus_B1,
            batch,
            use_fp64_gumbel=rejection_sampler.use_fp64_gumbel,
        )
    return rejection_sampler.verify_for_self_test(metadata, logits_TV, bonus_B1, batch)


def _check_distribution(output_token_ids: torch.Tensor, draft_token: int) -> None:
    """Where a first or second token is emitted, it must follow the target."""
    probs_V = target_distribution(torch.tensor(LOGITS), TEMPERATURE, TOP_K, TOP_P)
    output_token_ids = output_token_ids.cpu()
    for place in range(2):
        emitted = (output_token_ids[:, :place] == draft_token).all(dim=1)
        tokens = output_token_ids[emitted, place]
        if not len(tokens):
            continue
        in_vocabulary = bool(((tokens >= 0) & (tokens < len(probs_V))).all())
        result = chi_square(count_tokens(tokens, len(probs_V)), probs_V) if in_vocabulary else None
        if result is None or not result.passed:
            raise SpeculationUnsafeError(
                f"speculative sampling does not follow the target: {len(tokens)} tokens at place {place} "
                f"against draft {draft_token}, {result or 'some outside the vocabulary'}. "
                "Turn speculative decoding off"
            )
