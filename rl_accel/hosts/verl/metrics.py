"""What a step of rollouts looked like: lengths, request times, speculation, log-prob mismatch, token ids.

Reads the rollouts of a step from verl's TransferQueue records and the speculation counts of the engines. Names follow
verl and vLLM where they have one; `docs/metrics.md` lists all with unit and reduction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rl_accel.errors import MismatchError
from rl_accel.feature import Metric
from rl_accel.hosts.verl.identity import OCCURRENCE, PROBLEM_ID
from rl_accel.hosts.vllm import faults

FIELDS = [
    "metrics",
    "prompts",
    "responses",
    "response_mask",
    "rollout_log_probs",
    "old_log_probs",
    PROBLEM_ID,
    OCCURRENCE,
]
"""TransferQueue fields that this module reads; log-prob fields may be absent."""

METRICS = (
    Metric("response_length/p50", "tokens", "median", "over rollouts; verl has mean, min, max"),
    Metric("response_length/p95", "tokens", "95th percentile", "over rollouts"),
    Metric("rollout/num_response_tokens", "tokens", "sum", "tokens generated"),
    Metric(
        "rollout/slowest_request_s",
        "s",
        "max",
        "over rollouts, from request to last token; absent where an agent loop of your own does not measure it",
    ),
    Metric("rollout/median_request_s", "s", "median", "the same"),
    Metric("rollout/spec_accept_rate", "1", "accepted / drafted", "over all engines; 0 without drafts"),
    Metric("rollout/spec_accept_length", "tokens", "mean", "emitted per verified draft; 1 without drafts"),
    Metric("rollout/spec_num_drafts", "drafts", "sum", "verified drafts: requests with a draft, over engine steps"),
    Metric("rollout/spec_num_draft_tokens", "tokens", "sum", "drafted"),
    Metric("rollout/spec_num_accepted_tokens", "tokens", "sum", "accepted"),
    Metric(
        "rl_accel/rollout/logprob_abs_diff_mean",
        "nat",
        "mean",
        "over tokens: engine's against trainer's log-prob of the sampled token",
    ),
    Metric("rl_accel/rollout/logprob_abs_diff_max", "nat", "max", "the same"),
    Metric(
        "rl_accel/rollout/mismatch_kl",
        "nat",
        "mean",
        "over tokens: KL of the trainer's policy from the one that the engine samples from, by exp(d) - 1 - d, d the "
        "trainer's log-prob less the engine's",
    ),
    Metric(
        "rl_accel/rollout/changed_share",
        "1",
        "mean",
        "share of tokens that a rejection test against the trainer's policy would change (total variation), by "
        "max(0, 1 - exp(d))",
    ),
    Metric(
        "rl_accel/rollout/malformed_identities",
        "requests",
        "sum",
        'since the start: requests whose `extra_args["rl_accel"]` cannot be read; served as anonymous',
    ),
)
"""Of every run, by their full names; those of features are in their descriptors."""


def sum_counts(counts: Sequence[Mapping[str, int] | None]) -> dict[str, int]:
    """Add up the counters of the rollout replicas; replicas without any answer None."""
    total: dict[str, int] = {}
    for count in counts:
        for name, value in (count or {}).items():
            total[name] = total.get(name, 0) + int(value)
    return total


def rollout_metrics(rollouts, spec_counts: Mapping[str, int]) -> dict[str, float]:
    """Return the metrics of one step's rollouts.

    Args:
        rollouts: TensorDict of N rollouts with the fields `FIELDS`.
        spec_counts: num_drafts, num_draft_tokens, num_accepted_tokens of the step, absent without speculation; faults
            since the start.
    """
    lengths = rollouts["responses"].offsets().diff().double().numpy()
    metrics = {
        "response_length/p50": float(np.percentile(lengths, 50)),
        "response_length/p95": float(np.percentile(lengths, 95)),
        "rollout/num_response_tokens": float(lengths.sum()),
    }
    seconds = [second for second in map(_seconds, rollouts["metrics"]) if second is not None]
    if seconds:
        metrics["rollout/slowest_request_s"] = max(seconds)
        metrics["rollout/median_request_s"] = float(np.median(seconds))
    metrics.update(speculation_metrics(spec_counts))
    metrics["rl_accel/rollout/malformed_identities"] = float(spec_counts.get(faults.MALFORMED, 0))
    if "rollout_log_probs" in rollouts and "old_log_probs" in rollouts:
        mask = rollouts["response_mask"].values().bool()
        gain = (rollouts["old_log_probs"].values() - rollouts["rollout_log_probs"].values())[mask].double()
        metrics["rl_accel/rollout/logprob_abs_diff_mean"] = float(gain.abs().mean())
        metrics["rl_accel/rollout/logprob_abs_diff_max"] = float(gain.abs().max())
        metrics["rl_accel/rollout/mismatch_kl"] = float((gain.expm1() - gain).mean())
        metrics["rl_accel/rollout/changed_share"] = float((-gain.expm1()).clamp(min=0.0).mean())
    return metrics


def speculation_metrics(counts: Mapping[str, int]) -> dict[str, float]:
    """Acceptance as verl names it; without speculation one token is emitted a pass and nothing is drafted.

    `spec_accept_length` counts emitted tokens per verified draft: accepted ones and the one that the target adds.
    """
    drafts, drafted = counts.get("num_drafts", 0), counts.get("num_draft_tokens", 0)
    accepted = counts.get("num_accepted_tokens", 0)
    return {
        "rollout/spec_accept_rate": accepted / drafted if drafted else 0.0,
        "rollout/spec_accept_length": 1.0 + (accepted / drafts if drafts else 0.0),
        "rollout/spec_num_drafts": float(drafts),
        "rollout/spec_num_draft_tokens": float(drafted),
        "rollout/spec_num_accepted_tokens": float(accepted),
    }


def check_mismatch(
    metrics: Mapping[str, float], step: int, truncated: bool, max_probs_diff: float = 0.1, min_pearson: float = 0.9
) -> None:
    """Stop a run whose engine and trainer do not hold the same policy.

    Args:
        metrics: of the step, with verl's `training/rollout_probs_diff_max` if it has log-probs of the rollout.
        truncated: sampling by top-k or top-p. The engine's probabilities are then those after truncation, which the
            trainer does not apply, so that a large difference means nothing.
        max_probs_diff, min_pearson: what the features that are on may do.

    Raises:
        MismatchError: if the difference is not a number, or large while the probabilities do not correlate either.
    """
    difference = metrics.get("training/rollout_probs_diff_max")
    if difference is None:
        return
    pearson = metrics.get("training/rollout_actor_probs_pearson_corr", 1.0)
    unrelated = not truncated and difference > max_probs_diff and not pearson >= min_pearson
    if unrelated or not math.isfinite(difference):
        raise MismatchError(
            f"step {step}: rollout engine and trainer disagree on the probabilities of the sampled tokens: largest "
            f"difference {difference:.3g}, correlation {pearson:.3g}. The engine samples from other weights or its "
            "log-probs are wrong; training on them would be off-policy without saying so"
        )


def split_key(key: str) -> tuple[str, int, int]:
    """Split a TransferQueue key `{uid}_{session}_{output}`; the tuples sort as the rollouts should."""
    uid, session, output = key.rsplit("_", 2)
    return uid, int(session), int(output)


def row_names(keys: Sequence[str], rollouts) -> list[tuple[str, int, int]]:
    """Return problem, sample and output of every rollout; samples count on where a problem occurs again in a batch."""
    sessions = [split_key(key)[1:] for key in keys]
    width = max((session for session, _ in sessions), default=0) + 1
    return [
        (str(_unwrap(problem)), int(_unwrap(occurrence)) * width + session, output)
        for problem, occurrence, (session, output) in zip(
            rollouts[PROBLEM_ID], rollouts[OCCURRENCE], sessions, strict=True
        )
    ]


def _unwrap(value: Any) -> Any:
    return getattr(value, "data", value)


def _seconds(metrics: Any) -> float | None:
    """Seconds of generation that an agent loop measured; one of the user's own may not have."""
    metrics = _unwrap(metrics)
    if isinstance(metrics, Mapping):
        seconds = metrics.get("generate_sequences")
    else:
        seconds = getattr(metrics, "generate_sequences", None)
    return None if seconds is None else float(seconds)
