"""The step's metrics from counters and log-probs, and the guard that stops a run on the wrong policy."""

import math

import pytest

from rl_accel.errors import MismatchError
from rl_accel.hosts.verl.identity import problem_id_of
from rl_accel.hosts.verl.metrics import check_mismatch, speculation_metrics, sum_counts


def test_acceptance_over_replicas():
    counts = sum_counts(
        [
            {"num_drafts": 10, "num_draft_tokens": 40, "num_accepted_tokens": 12},
            None,
            {"num_drafts": 10, "num_draft_tokens": 60, "num_accepted_tokens": 8},
        ]
    )
    metrics = speculation_metrics(counts)
    assert metrics["rollout/spec_accept_rate"] == 20 / 100
    assert metrics["rollout/spec_accept_length"] == 1 + 20 / 20
    assert metrics["rollout/spec_num_draft_tokens"] == 100


def test_without_drafts_one_token_is_emitted_a_pass():
    metrics = speculation_metrics({})
    assert (metrics["rollout/spec_accept_length"], metrics["rollout/spec_accept_rate"]) == (1.0, 0.0)


def values(difference, correlation):
    return {
        "training/rollout_probs_diff_max": difference,
        "training/rollout_actor_probs_pearson_corr": correlation,
    }


@pytest.mark.parametrize(("difference", "correlation"), [(math.nan, 1.0), (0.5, 0.1), (0.5, math.nan)])
def test_the_wrong_policy_stops_the_run(difference, correlation):
    with pytest.raises(MismatchError, match="step 3"):
        check_mismatch(values(difference, correlation), 3, truncated=False)


@pytest.mark.parametrize(("difference", "correlation"), [(1e-6, 1.0), (0.3, 0.99), (1e-3, math.nan)])
def test_rounding_does_not(difference, correlation):
    check_mismatch(values(difference, correlation), 3, truncated=False)
    check_mismatch({}, 3, truncated=False)


def test_truncated_sampling_may_differ_but_must_be_a_number():
    check_mismatch(values(0.5, math.nan), 3, truncated=True)
    with pytest.raises(MismatchError):
        check_mismatch(values(math.nan, 1.0), 3, truncated=True)


def test_a_problem_has_one_name_everywhere():
    prompt = [{"role": "user", "content": "2+2?"}]
    assert problem_id_of({"problem_id": 7}, "a", prompt) == "7"
    assert problem_id_of({"split": "train", "index": 3}, "a", prompt) == "a/train/3"
    assert problem_id_of(None, "a", prompt) == problem_id_of({"index": 3}, "b", list(prompt))
    assert problem_id_of(None, "a", prompt) != problem_id_of(None, "a", [{"role": "user", "content": "2+3?"}])
