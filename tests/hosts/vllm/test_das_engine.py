"""DAS drafting inside a real vLLM engine: the same tokens as without, drafts that are accepted, and every way in which
requests come and go. The engines: `das_engine.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from .das_workload import MAX_TOKENS, NUM_PROBLEMS, NUM_SAMPLES
from .tiny_qwen import build_model

ENGINE = Path(__file__).with_name("das_engine.py")


@pytest.fixture(scope="module")
def engines(run_ranks, tmp_path_factory):
    """MODE -> result, each engine started once."""
    model = tmp_path_factory.mktemp("das") / "model"
    build_model(model)
    results: dict[str, dict] = {}

    def run(mode: str) -> dict:
        if mode not in results:
            (results[mode],) = run_ranks(ENGINE, 1, str(model), mode, timeout=400)
        return results[mode]

    return run


def accepted(result: dict, epoch: int) -> int:
    return result["stats"][epoch][0]["counts"]["num_accepted_tokens"]


def test_tokens_are_those_without_drafts(engines) -> None:
    das, plain = engines("das"), engines("plain")
    assert das["live"][0]["features"]["draft"] == "das" and "draft" not in plain["live"][0]["features"]
    assert das["tokens"] == plain["tokens"]


def test_later_epochs_accept_more(engines) -> None:
    das = engines("das")
    assert accepted(das, 0) > 0
    assert accepted(das, 2) > accepted(das, 0)
    assert das["stats"][2][0]["metrics"]["accepted_by_epoch_1"] > 0


def test_everything_that_ended_is_history_and_nothing_stays_open(engines) -> None:
    for epoch in engines("das")["stats"]:
        assert epoch[0]["open"] == 0
        assert epoch[0]["segment"]["num_rollouts"] == NUM_PROBLEMS * NUM_SAMPLES
        assert epoch[0]["segment"]["num_tokens"] == NUM_PROBLEMS * NUM_SAMPLES * MAX_TOKENS


def test_drafting_that_does_not_pay_turns_itself_off_and_loses_nothing(engines) -> None:
    """Hardly a draft is made, the index backs off, and history is still whole to the last token of every request.

    In the third epoch, after 128 steps, a probe finds that drafts cost less in fact.
    """
    expensive, das = engines("expensive"), engines("das")
    assert expensive["tokens"] == engines("plain")["tokens"]
    drafted, usual = (
        sum(epoch[0]["counts"]["num_draft_tokens"] for epoch in result["stats"][:2]) for result in (expensive, das)
    )
    assert drafted < 0.1 * usual
    for epoch in expensive["stats"]:
        assert epoch[0]["open"] == 0
        assert epoch[0]["segment"]["num_tokens"] == NUM_PROBLEMS * NUM_SAMPLES * MAX_TOKENS


def test_validation_leaves_no_history(engines) -> None:
    after = engines("das")["after_validation"][0]
    assert after["open"] == 0
    assert after["segment"]["num_tokens"] == 0


def test_a_snapshot_comes_back_and_a_damaged_one_is_refused(engines) -> None:
    """After the refusal the engine goes on, and samples what it would have sampled."""
    das = engines("das")
    assert das["snapshots"]["whole"]["restored"] is True
    assert das["snapshots"]["whole"]["tokens"] == das["aborted"]["state"][0]["segment"]["num_tokens"] > 0
    assert das["snapshots"]["spoiled"]["restored"] is False
    assert "damaged" in das["snapshots"]["spoiled"]["reason"]
    assert das["after_refusal"] == das["tokens"][0][0]


def test_aborted_requests_end(engines) -> None:
    aborted = engines("das")["aborted"]
    assert aborted["finished"] == {"a2": "length", "a3": "length"}
    assert aborted["state"][0]["open"] == 0
    assert 2 * MAX_TOKENS < aborted["state"][0]["segment"]["num_tokens"] < 4 * MAX_TOKENS
    assert aborted["state"][0]["segment"]["num_rollouts"] == 4


def test_a_hint_is_the_draft_while_the_text_follows_it(engines) -> None:
    """Right or wrong, alone or beside others, tokens stay; what is no hint is left out, and nothing is kept."""
    hints = engines("das")["hints"]
    assert all(tokens == hints["plain"] for tokens in [*hints["tokens"].values(), *hints["together"]])
    for name in ("none", "empty", "no_list", "no_ids", "negative", "too_large"):
        assert hints["offered"][name] == 0, name
    # From the first step on, which also has the prompt, a token more than a draft of 8 each: 48 in 6 engine steps.
    for name in ("right", "longer"):
        counts = hints["drafts"][name]
        assert counts["num_drafts"] == 6 and counts["num_accepted_tokens"] == counts["num_draft_tokens"] == 42, name
        assert hints["offered"][name] == 42
    assert hints["offered"]["first_half"] == 24 - 2
    assert hints["offered"]["leaves"] == 2 * 8 and hints["drafts"]["leaves"]["num_accepted_tokens"] >= 8
    assert hints["offered"]["wrong"] == 8, "of the first step"
    assert hints["padded"] == hints["padded_plain"]
    assert hints["open"] == hints["kept"] == 0


def test_preempted_requests_go_on_where_they_were(engines) -> None:
    """Too little KV cache for all: requests leave the batch and come back, and tokens stay the same."""
    das, plain = engines("preempt"), engines("plain_preempt")
    assert das["preemptions"] > 0, "the cache was large enough for all; the test tested nothing"
    assert das["tokens"] == plain["tokens"] == engines("plain")["tokens"]
    assert accepted(das, 2) > 0
    assert das["stats"][2][0]["segment"]["num_tokens"] == NUM_PROBLEMS * NUM_SAMPLES * MAX_TOKENS


def test_serving_without_verl_learns_from_its_own_traffic(engines) -> None:
    """No settings but `speculative_config`; problems are told apart by their prompts."""
    serve = engines("serve")
    assert serve["live"][0]["features"]["draft"] == "das" and serve["live"][0]["self_test"] == "passed"
    assert accepted(serve, 2) > accepted(serve, 0) > 0
    assert serve["stats"][0][0]["segment"]["num_problems"] == NUM_PROBLEMS


def test_tensor_parallel_ranks_take_one_ranks_drafts(engines) -> None:
    """Rank 0 drafts; both ranks verify the same drafts, so both count the same."""
    tp2 = engines("tp2")
    first, second = tp2["stats"][2]
    assert "segment" in first and "segment" not in second
    assert first["counts"] == second["counts"]
    assert first["counts"]["num_accepted_tokens"] > 0


def test_segments_of_any_size_pass_between_engine_and_trainer(engines) -> None:
    """Only the rank that drafts gives and takes. 18 MB are more than one chunk of the queue to the ranks."""
    shared = engines("tp2")["shared"]
    first, second = shared["taken"]
    assert first > 8 * MAX_TOKENS and second == 0
    assert shared["size"] > 16 << 20 and shared["given"] == [True, False]
    assert [s["num_bytes"] for s in shared["held"] if s["foreign"]] == [shared["size"]]


def test_a_custom_class_without_the_plugin_is_refused() -> None:
    from types import SimpleNamespace

    from rl_accel.draft.hosts.proposer import DASProposer
    from rl_accel.errors import NotLiveError

    config = SimpleNamespace(
        additional_config=None,
        speculative_config=SimpleNamespace(num_speculative_tokens=8),
        model_config=SimpleNamespace(max_model_len=64),
    )
    with pytest.raises(NotLiveError, match=r"vllm\.general_plugins"):
        DASProposer(config).load_model()
