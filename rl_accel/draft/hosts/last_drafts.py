"""No drafts for requests that have ended, where a language model would write them token by token.

vLLM's model drafter is asked before the scheduler has seen the sampled tokens, and drafts for requests of which the
last token was just sampled. With texts that are asked for step by step, each its own request, that is every other time.
Where all rows of a step have ended, one draft token is asked for instead of all: that pass still writes the draft
model's keys and values, which later requests may find in the prefix cache.

Left out: asynchronous scheduling, where looking at sampled tokens would wait for the device.

Host symbols (vLLM 0.28.0): `GPUModelRunner.propose_draft_token_ids`, `SchedulerOutput.num_spec_tokens_to_schedule`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch


def install(runner: Any) -> None:
    """Wrap the drafter's call of one runner, if it drafts by a model and schedules synchronously."""
    config = runner.vllm_config
    if config.speculative_config.method != "draft_model" or config.scheduler_config.async_scheduling:
        return
    propose = runner.propose_draft_token_ids

    @functools.wraps(propose)
    def propose_draft_token_ids(scheduler_output: Any, sampled_token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if all_end(runner, sampled_token_ids):
            scheduler_output.num_spec_tokens_to_schedule = 1
        return propose(scheduler_output, sampled_token_ids, *args, **kwargs)

    runner.propose_draft_token_ids = propose_draft_token_ids


def all_end(runner: Any, sampled_token_ids: Any) -> bool:
    """Return whether the last token of every row ends its request.

    Args:
        sampled_token_ids: int [rows, 1 + drafts], -1 behind the last token of a row, or lists of tokens.
    """
    rows = sampled_token_ids.tolist() if isinstance(sampled_token_ids, torch.Tensor) else sampled_token_ids
    for name, row in zip(runner.input_batch.req_ids, rows, strict=False):
        tokens = [token for token in row if token >= 0]
        request = runner.requests[name]
        params = request.sampling_params
        if params is None or not tokens:
            return False
        written = len(request.output_token_ids) + len(tokens)
        if written < (params.max_tokens or 0) and params.all_stop_token_ids.isdisjoint(tokens):
            return False
    return bool(rows)
