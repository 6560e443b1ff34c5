"""Position-keyed sampling inside vLLM's V1 model runner, for plain and speculating steps.

Replaces the *instances* `runner.sampler` and `runner.rejection_sampler` by subclasses that differ from
vLLM's in one act: where vLLM draws a random token, they take `gumbel_argmax` with the request's key and the
token's absolute position (`row_identity.py`). Temperature, top-k, top-p, penalties, masks, greedy rows and
log-probs are vLLM's own code. A request's own seed no longer feeds a generator; it only names a request that
has no key.

Left out: drafts sampled from a draft model (`draft_probs`), which go to vLLM's rejection sampling. Caveat:
on GPU vLLM filters top-k and top-p by another kernel below 8 rows than above, so that a token at the very
edge of the nucleus can depend on the batch.

Host symbols (vLLM 0.28.0): `GPUModelRunner._sample`, `._dummy_sampler_run`; `Sampler.topk_topp_sampler`;
`RejectionSampler.forward`, whose order of steps `forward` below repeats; `apply_top_k_top_p`;
`rejection_sampler.apply_sampling_constraints`; `SpecDecodeMetadata`.

Shape suffixes: B requests, T draft tokens of all requests, R = T + B logits rows of a speculating step,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample import rejection_sampler as vllm_rejection
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from rl_accel.errors import ConfigError
from rl_accel.kernels.gumbel_argmax.api import gumbel_argmax
from rl_accel.sampling.hosts.row_identity import RowSource, StepRows, rows_of_step
from rl_accel.sampling.verify import verify_drafts


class ExactTopKTopPSampler(torch.nn.Module):
    """Takes the place of TopKTopPSampler: the same filter, then position-keyed sampling."""

    def __init__(self, logprobs_mode: str, rows: RowSource):
        super().__init__()
        self.logprobs_mode = logprobs_mode
        self.rows = rows

    def forward(
        self,
        logits: torch.Tensor,
        generators: dict[int, torch.Generator],
        k: torch.Tensor | None,
        p: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return int64 [B] tokens and, in the processed modes, the [B, V] to report; overwrites logits."""
        step = self.rows.get()
        logits = apply_top_k_top_p(logits, k, p)
        to_return = None
        if self.logprobs_mode == "processed_logits":
            to_return = logits
        elif self.logprobs_mode == "processed_logprobs":
            to_return = logits.log_softmax(dim=-1, dtype=torch.float32)
        return gumbel_argmax(logits, step.keys_B, step.positions_B), to_return


class ExactSampler(Sampler):
    """vLLM's Sampler over ExactTopKTopPSampler."""

    def __init__(self, stock: Sampler, rows: RowSource):
        super().__init__(stock.logprobs_mode, stock.use_fp64_gumbel)
        self.topk_topp_sampler = ExactTopKTopPSampler(stock.logprobs_mode, rows)


class ExactRejectionSampler(RejectionSampler):
    """vLLM's RejectionSampler that samples every target row by position and compares with the draft."""

    def __init__(self, sampler: ExactSampler, spec_config: Any, device: torch.device, rows: RowSource):
        super().__init__(sampler, spec_config, device)
        self.rows = rows

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """Return what vLLM's forward returns; [R, V] logits are not modified."""
        if draft_probs is not None:
            return super().forward(metadata, draft_probs, logits, sampling_metadata)
        bonus = self.sampler(
            logits=logits[metadata.bonus_logits_indices],
            sampling_metadata=replace(sampling_metadata, max_num_logprobs=-1),
            predict_bonus_token=True,
            logprobs_mode_override="processed_logits" if self.is_processed_logprobs_mode else "raw_logits",
        )
        raw_TV = logits[metadata.target_logits_indices].to(torch.float32)
        logits_TV = raw_TV if self.is_processed_logprobs_mode else raw_TV.clone()
        logits_TV = self.apply_logits_processors(logits_TV, sampling_metadata, metadata)
        logits_TV = vllm_rejection.apply_sampling_constraints(
            logits_TV, metadata.cu_num_draft_tokens, sampling_metadata
        )
        output_token_ids = self.verify(metadata, logits_TV, bonus.sampled_token_ids, sampling_metadata)
        logprobs_tensors = None
        if sampling_metadata.max_num_logprobs is not None:
            logprobs_tensors = self._get_logprobs_tensors(
                sampling_metadata.max_num_logprobs,
                metadata,
                logits,
                logits_TV if self.is_processed_logprobs_mode else raw_TV,
                bonus.logprobs_tensors.logprobs,
                output_token_ids,
            )
        return SamplerOutput(sampled_token_ids=output_token_ids, logprobs_tensors=logprobs_tensors)

    def verify(
        self,
        metadata: SpecDecodeMetadata,
        logits_TV: torch.Tensor,
        bonus_token_ids: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> torch.Tensor:
        """Sample the target at every draft token and cut: int32 [B, max_spec_len + 1], -1 behind the last
        token.

        Args:
            metadata: the drafts.
            logits_TV: fully processed target logits at the drafts' places.
            bonus_token_ids: [B, 1], the target's sample behind the drafts.
            sampling_metadata: tells greedy requests (temperature 0) from random ones.
        """
        step = self.rows.get()
        if sampling_metadata.all_greedy:
            tokens_T = logits_TV.argmax(dim=-1)
        else:
            assert step.keys_T is not None and step.positions_T is not None
            tokens_T = gumbel_argmax(logits_TV, step.keys_T, step.positions_T)
            if not sampling_metadata.all_random:
                greedy_B = sampling_metadata.temperature == vllm_rejection.GREEDY_TEMPERATURE
                tokens_T = torch.where(greedy_B[step.request_T], logits_TV.argmax(dim=-1), tokens_T)
        return verify_drafts(
            tokens_T,
            metadata.draft_token_ids,
            metadata.num_draft_tokens,
            bonus_token_ids,
            metadata.max_spec_len,
        )

    def verify_for_self_test(
        self,
        metadata: SpecDecodeMetadata,
        logits_TV: torch.Tensor,
        bonus_token_ids: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> torch.Tensor:
        """As `verify`, with a key of its own for every request, outside of a step (`hosts/vllm/self_test.py`)."""
        counts_B = torch.tensor(metadata.num_draft_tokens, device=logits_TV.device)
        keys_B = torch.arange(len(counts_B), device=logits_TV.device)
        request_T = keys_B.repeat_interleave(counts_B)
        starts_B = counts_B.cumsum(0) - counts_B
        positions_T = torch.arange(len(request_T), device=logits_TV.device) - starts_B[request_T]
        with self.rows.of(StepRows(keys_B, keys_B, request_T, positions_T, request_T)):
            return self.verify(metadata, logits_TV, bonus_token_ids, sampling_metadata)


def install(runner: Any, seed: int) -> None:
    """Make one V1 model runner sample by position.

    Raises:
        ConfigError: if vLLM was asked for a rejection sampling method that changes the distribution.
    """
    spec_config = runner.speculative_config
    if spec_config is not None and spec_config.rejection_sample_method != "standard":
        raise ConfigError(
            "rl_accel.sampling.exact needs rejection_sample_method='standard' in speculative_config; got "
            f"{spec_config.rejection_sample_method!r}"
        )
    rows = RowSource()
    runner.sampler = ExactSampler(runner.sampler, rows)
    if hasattr(runner, "rejection_sampler"):
        runner.rejection_sampler = ExactRejectionSampler(runner.sampler, spec_config, runner.device, rows)
    stock_sample, stock_dummy_run = runner._sample, runner._dummy_sampler_run

    def sample(logits: torch.Tensor | None, spec_decode_metadata: SpecDecodeMetadata | None) -> SamplerOutput:
        with rows.of(rows_of_step(runner, spec_decode_metadata, seed)):
            return stock_sample(logits, spec_decode_metadata)

    def dummy_sampler_run(hidden_states: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(len(hidden_states), dtype=torch.int64, device=runner.device)
        with rows.of(StepRows(zeros, zeros, zeros, zeros, zeros)):  # warm-up drafts one token per request
            return stock_dummy_run(hidden_states)

    runner._sample = sample
    runner._dummy_sampler_run = dummy_sampler_run
