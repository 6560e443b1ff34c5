"""The step's metrics from counters and log-probs, and the guard that stops a run on the wrong policy."""

import math

import pytest
import torch
from tensordict import NonTensorStack, TensorDict

from rl_accel.compare.tokens import load_tokens
from rl_accel.draft.hosts.trainer import record_rollouts
from rl_accel.draft.record import read_rollouts
from rl_accel.errors import MismatchError
from rl_accel.hosts.verl.engines import add_up
from rl_accel.hosts.verl.identity import OCCURRENCE, PROBLEM_ID, problem_id_of
from rl_accel.hosts.verl.metrics import (
    check_mismatch,
    rollout_metrics,
    speculation_metrics,
    split_key,
    sum_counts,
)
from rl_accel.trace.hosts.trainer import save_rollout_tokens


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


def test_mismatch_is_the_divergence_of_two_policies():
    """Both estimates are unbiased under tokens of the engine: against KL and total variation of known policies."""
    engine, trainer = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.5, 0.3, 0.2])
    tokens = torch.repeat_interleave(torch.arange(3), torch.tensor([600, 300, 100]))
    masked = torch.cat([torch.ones(1000), torch.zeros(5)])
    rollouts = TensorDict(
        {
            "responses": torch.nested.as_nested_tensor([torch.zeros(1005, dtype=torch.long)], layout=torch.jagged),
            "response_mask": torch.nested.as_nested_tensor([masked], layout=torch.jagged),
            **{
                name: torch.nested.as_nested_tensor(
                    [torch.cat([probs.log()[tokens], torch.full((5,), -99.0 * i)])], layout=torch.jagged
                )
                for i, (name, probs) in enumerate((("rollout_log_probs", engine), ("old_log_probs", trainer)))
            },
            "metrics": NonTensorStack({}),
        },
        batch_size=[1],
    )
    metrics = rollout_metrics(rollouts, {})
    assert metrics["rl_accel/rollout/mismatch_kl"] == pytest.approx(float((engine * (engine / trainer).log()).sum()))
    assert metrics["rl_accel/rollout/changed_share"] == pytest.approx(0.1)
    assert metrics["rl_accel/rollout/logprob_abs_diff_max"] == pytest.approx(math.log(2.0))


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


def rollouts(*rows, metrics=None):
    """Keys and fields of a step as verl's TransferQueue returns them; a row is (key, problem, occurrence, response)."""

    def ragged(values):
        return torch.nested.as_nested_tensor([torch.tensor(value) for value in values], layout=torch.jagged)

    keys, problems, occurrences, responses = zip(*rows, strict=True)
    fields = {
        "prompts": ragged([[1, 2, 3]] * len(rows)),
        "responses": ragged(responses),
        "metrics": NonTensorStack(*(metrics or [{"generate_sequences": 0.5}] * len(rows))),
        PROBLEM_ID: NonTensorStack(*problems),
        OCCURRENCE: NonTensorStack(*occurrences),
    }
    return list(keys), TensorDict(fields, batch_size=[len(rows)])


def test_every_output_of_a_session_is_a_row(tmp_path):
    """Names of first outputs are those of loops with a single one, also where a problem occurs twice in a batch."""
    keys, step = rollouts(
        ("step00000001group000000_0_0", "p", 0, [5]),
        ("step00000001group000000_0_1", "p", 0, [6, 6]),
        ("step00000001group000000_1_0", "p", 0, [7]),
        ("step00000001group000001_0_0", "p", 1, [8]),
        ("step00000001group000001_1_0", "p", 1, [9]),
        ("step00000001group000001_1_10", "p", 1, [9, 9]),
        ("step00000001group000002_0_0", "q_0_1", 0, [4]),
    )
    save_rollout_tokens(tmp_path / "1.npz", keys, step)
    assert {name: row.token_ids.tolist() for name, row in load_tokens(tmp_path / "1.npz").items()} == {
        ("p", 0): [5],
        ("p [output 1]", 0): [6, 6],
        ("p", 1): [7],
        ("p", 2): [8],
        ("p", 3): [9],
        ("p [output 10]", 3): [9, 9],
        ("q_0_1", 0): [4],
    }
    record_rollouts(tmp_path / "rollouts.jsonl", keys, step, epoch=0, step=1)
    recorded = list(read_rollouts(tmp_path / "rollouts.jsonl"))
    assert [r.problem for r in recorded] == ["p"] * 6 + ["q_0_1"], "outputs are history of their problem"
    assert [r.token_ids for r in recorded] == [(5,), (6, 6), (7,), (8,), (9,), (9, 9), (4,)]


def test_keys_sort_by_group_session_and_output():
    keys = ["a_b_10_0", "a_b_2_11", "a_b_2_2", "a_a_3_0"]
    assert sorted(keys, key=split_key) == ["a_a_3_0", "a_b_2_2", "a_b_2_11", "a_b_10_0"]


def test_a_loop_that_measures_no_times_is_measured_otherwise():
    rows = (("g_0_0", "p", 0, [5, 6]), ("g_1_0", "p", 0, [7]))
    _, untimed = rollouts(*rows, metrics=[{}, {"num_preempted": 1}])
    found = rollout_metrics(untimed, {})
    assert found["rollout/num_response_tokens"] == 3 and "rollout/slowest_request_s" not in found
    _, half_timed = rollouts(*rows, metrics=[{}, {"generate_sequences": 0.25}])
    assert rollout_metrics(half_timed, {})["rollout/median_request_s"] == 0.25


def test_faults_of_the_engines_are_metrics():
    counts = sum_counts([{"malformed_identities": 2, "num_drafts": 1}, {"malformed_identities": 1}, None])
    _, step = rollouts(("g_0_0", "p", 0, [5]))
    assert rollout_metrics(step, counts)["rl_accel/rollout/malformed_identities"] == 3


def test_what_features_drained_is_reduced_by_their_tables():
    drained = [
        {"draft": {"engines_off": 1.0, "propose_ms": 2.0, "drafted_by_self": 3.0}},
        {"draft": {"engines_off": 0.0, "propose_ms": 5.0, "drafted_by_epoch_1": 4.0}, "sync": {"seconds": 0.5}},
    ]
    assert add_up(drained) == {
        "rl_accel/draft/engines_off": 1.0,
        "rl_accel/draft/propose_ms": 5.0,
        "rl_accel/draft/drafted_by_self": 3.0,
        "rl_accel/draft/drafted_by_epoch_1": 4.0,
        "rl_accel/sync/seconds": 0.5,
    }
    with pytest.raises(KeyError, match="feature draft has no metric 'unheard_of' in its table"):
        add_up([{"draft": {"unheard_of": 1.0}}])
