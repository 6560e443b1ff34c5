"""A request's hint is verified in its first step already, with the rest of its prompt.

vLLM asks a proposer after the first token, so a hint would cost an engine step that writes one token. Its scheduler and
runner can do better, as they show where they pad a new request's drafts: drafts of a request that is new in a step are
verified like any others. So when a step is scheduled that ends a new request's prompt, the hint is added to it.

Left out, so that such requests get their hint a step later: prompts in several chunks, grammars, KV connectors, cache
groups that are zeroed, asynchronous scheduling, and whatever does not fit into the step's budget or the cache.

Host symbols (vLLM 0.28.0): `Scheduler.schedule` and the request's counters that it advances; `SchedulerOutput`;
`NewRequestData.block_ids`; `KVCacheManager.allocate_slots`; `InputBatch.update_req_spec_token_ids` of new requests.
"""

from __future__ import annotations

import functools
from typing import Any

import wrapt

from rl_accel.draft.feature import DAS_PROPOSER
from rl_accel.draft.hints import hint_of
from rl_accel.hosts import versions

MODULE = "vllm.v1.core.sched.scheduler"
SERIES = "0.28."
"""Of vLLM: the counters below are that scheduler's; other versions offer a hint a step later."""


def register() -> None:
    """Wrap the scheduler's step when vLLM imports it; another drafter than ours sees nothing of it."""
    wrapt.register_post_import_hook(_wrap, MODULE)


def _wrap(module: Any) -> None:
    scheduler = module.Scheduler
    original = scheduler.schedule
    if getattr(original, "rl_accel_hints", False):
        return

    @functools.wraps(original)
    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        if output.scheduled_new_reqs and _takes_hints(self):
            for new in output.scheduled_new_reqs:
                _add_hint(self, output, new)
        return output

    schedule.rl_accel_hints = True  # type: ignore[attr-defined]
    scheduler.schedule = schedule


def _takes_hints(scheduler: Any) -> bool:
    try:
        return scheduler.rl_accel_takes_hints
    except AttributeError:
        config = scheduler.vllm_config
        scheduler.rl_accel_takes_hints = found = (
            (versions.installed("vllm") or "").startswith(SERIES)
            and _drafts_by_ours(config)
            and not config.scheduler_config.async_scheduling
            and scheduler.connector is None
            and not scheduler.needs_kv_cache_zeroing
        )
        return found


def _drafts_by_ours(vllm_config: Any) -> bool:
    """By our proposer, or by vLLM's of a model where rl_accel asked for it."""
    speculative = vllm_config.speculative_config
    if getattr(speculative, "model", None) == DAS_PROPOSER:
        return True
    draft = ((vllm_config.additional_config or {}).get("rl_accel") or {}).get("draft") or {}
    return getattr(speculative, "method", None) == "draft_model" and draft.get("method") == "model"


def _add_hint(scheduler: Any, output: Any, new: Any) -> None:
    """Add the hint of a new request to the step, if its prompt ends with it and there is room."""
    request = scheduler.requests[new.req_id]
    params = request.sampling_params
    if params is None or not params.extra_args:
        return
    try:
        hint = hint_of(params.extra_args, scheduler.vllm_config.model_config.get_vocab_size())
    except ValueError:
        return  # the proposer counts it, and says so
    if not hint or request.is_prefill_chunk or request.use_structured_output or request.prompt_token_ids is None:
        return
    drafts = output.scheduled_spec_decode_tokens
    room = min(
        scheduler.num_spec_tokens,
        min(request.max_tokens, scheduler.max_model_len - request.num_tokens) - 1,  # a token comes after the drafts
        len(drafts[new.req_id]) if new.req_id in drafts else _budget(scheduler) - output.total_num_scheduled_tokens,
    )
    hint = hint[: max(room, 0)]
    if not hint:
        return
    if new.req_id in drafts:  # padded by vLLM
        drafts[new.req_id] = hint + drafts[new.req_id][len(hint) :]
        return
    blocks = scheduler.kv_cache_manager.allocate_slots(
        request, len(hint), num_lookahead_tokens=scheduler.num_lookahead_tokens
    )
    if blocks is None:
        return
    for ids, more in zip(new.block_ids, blocks.get_block_ids(), strict=True):
        ids.extend(more)
    drafts[new.req_id] = hint
    output.num_scheduled_tokens[new.req_id] += len(hint)
    output.total_num_scheduled_tokens += len(hint)
    request.num_computed_tokens += len(hint)
    request.num_in_flight_tokens += len(hint)


def _budget(scheduler: Any) -> int:
    return min(scheduler.max_num_scheduled_tokens, scheduler.scheduler_config.max_num_batched_tokens)
