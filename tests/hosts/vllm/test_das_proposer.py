"""What the DAS proposer does between steps: epochs of serving, and segments that engines share. The drafter is real;
the model runner is reduced to the tables that the proposer reads."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from rl_accel.draft.hosts import proposer as das_module
from rl_accel.draft.hosts.proposer import DASProposer
from rl_accel.hosts.vllm.faults import Faults

PROMPT = [5, 6, 7]
TEXT = list(range(10, 50))
NO_FAULTS: dict = {}


def model_config():
    return SimpleNamespace(
        max_model_len=128,
        tokenizer="none",
        get_vocab_size=lambda: 300,
        hf_text_config=SimpleNamespace(eos_token_id=2),
        try_get_generation_config=dict,
        enforce_eager=True,
    )


def new_proposer() -> DASProposer:
    config = SimpleNamespace(
        additional_config=None,
        speculative_config=SimpleNamespace(num_speculative_tokens=8),
        model_config=model_config(),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=[]),
        device_config=SimpleNamespace(device_type="cpu"),
    )
    proposer = DASProposer(config)
    runner = SimpleNamespace(
        requests={},
        input_batch=SimpleNamespace(req_ids=[], num_prompt_tokens=[]),
        take_draft_token_ids=lambda: "drafts",
        rl_accel_faults=Faults(),
    )
    proposer.attach(runner)
    return proposer


class Step:
    """One request of a runner, a row of its own."""

    def __init__(self, proposer: DASProposer, name: str, identity: dict | None):
        self.proposer, self.name = proposer, name
        extra = {"rl_accel": identity} if identity else None
        params = SimpleNamespace(extra_args=extra, max_tokens=64, ignore_eos=False)
        proposer.runner.requests[name] = SimpleNamespace(
            req_id=name,
            sampling_params=params,
            output_token_ids=[],
            prompt_token_ids=list(PROMPT),
            prompt_is_token_ids=None,
        )
        self.table = np.zeros((1, 128), np.int32)
        self.table[0, : len(PROMPT)] = PROMPT
        self.length = len(PROMPT)

    def gain(self, tokens: list[int]) -> list[int]:
        self.table[0, self.length : self.length + len(tokens)] = tokens
        self.length += len(tokens)
        self.proposer.runner.requests[self.name].output_token_ids += tokens
        batch = self.proposer.runner.input_batch
        batch.req_ids, batch.num_prompt_tokens = [self.name], [len(PROMPT)]
        return self.proposer.propose([tokens], np.array([self.length]), self.table)[0]

    def finish(self) -> None:
        del self.proposer.runner.requests[self.name]


def identity(sample: int, validate: bool = False) -> dict:
    return {"problem_id": "p", "sample_index": sample, "step": 0, "validate": validate}


def teach(proposer: DASProposer) -> None:
    request = Step(proposer, "teacher", identity(0))
    request.gain(TEXT)
    request.finish()


def test_engines_share_their_closed_epochs() -> None:
    first, second = new_proposer(), new_proposer()
    teach(first)
    assert first.close_epoch(0, 1, share=True)["num_tokens"] == len(TEXT)
    second.close_epoch(0, 1, share=True)
    assert second.take_segment() == b"", "an engine without rollouts in this epoch has none to give"
    assert second.add_segment(first.take_segment()) is True
    assert first.take_segment() == b""
    assert Step(second, "pupil", identity(1)).gain(TEXT[:2]) == TEXT[2:10]


def test_a_damaged_shared_segment_is_left_out() -> None:
    first, second = new_proposer(), new_proposer()
    teach(first)
    first.close_epoch(0, 1, share=True)
    segment = first.take_segment()
    for damaged in (segment[:-4], b"", b"x" * len(segment)):
        assert second.add_segment(damaged) is False
    assert Step(second, "pupil", identity(1)).gain(TEXT[:2]) == []


def test_a_single_engine_keeps_nothing_to_share() -> None:
    """Else a later run with several engines would be given all of it."""
    proposer = new_proposer()
    teach(proposer)
    proposer.close_epoch(0, 1)
    assert proposer.take_segment() == b""


def test_validation_learns_from_nobody_and_teaches_nobody() -> None:
    proposer = new_proposer()
    request = Step(proposer, "validation", identity(0, validate=True))
    request.gain(TEXT)
    request.finish()
    assert proposer.close_epoch(0, 1)["num_tokens"] == 0
    assert Step(proposer, "training", identity(1)).gain(TEXT[:4]) == []


def test_serving_closes_epochs_by_itself(monkeypatch) -> None:
    """Without a trainer nobody else would; otherwise the live tier would grow for ever."""
    monkeypatch.setattr(das_module, "FOREIGN_EPOCH_TOKENS", 2 * len(TEXT))
    proposer = new_proposer()
    for i in range(6):
        request = Step(proposer, f"r{i}", None)
        request.gain(TEXT)
        request.finish()
    drafter = proposer.drafter
    Step(proposer, "last", None).gain([1])
    assert drafter.epoch >= 2
    assert sum(s["num_tokens"] for s in drafter.index.segments()) >= 4 * len(TEXT)


def test_rows_of_unfinished_prompts_get_no_draft_and_begin_nothing() -> None:
    proposer = new_proposer()
    request = Step(proposer, "r", identity(0))
    assert request.gain([]) == []
    assert len(proposer.drafter) == 0


@pytest.mark.parametrize("calls_missed", [1, 5])
def test_steps_without_a_call_are_caught_up(calls_missed) -> None:
    """vLLM asks nobody while one request is close to the end of the context."""
    proposer = new_proposer()
    teach(proposer)
    proposer.close_epoch(0, 1)
    request = Step(proposer, "r", identity(1))
    request.gain(TEXT[:2])
    missed = TEXT[2 : 2 + calls_missed]
    request.table[0, request.length : request.length + len(missed)] = missed
    request.length += len(missed)
    after = 2 + calls_missed
    assert request.gain([TEXT[after]]) == TEXT[after + 1 : after + 9]


class Batch:
    """Several requests of a runner, a row each; `step` lets every one of them gain tokens."""

    def __init__(self, proposer: DASProposer, names: list[str]):
        self.proposer, self.requests = (
            proposer,
            {name: Step(proposer, name, identity(i)) for i, name in enumerate(names)},
        )

    def step(self, tokens: list[int]) -> dict[str, list[int]]:
        batch, names = self.proposer.runner.input_batch, list(self.requests)
        batch.req_ids, batch.num_prompt_tokens = names, [len(PROMPT)] * len(names)
        for request in self.requests.values():
            request.table[0, request.length : request.length + len(tokens)] = tokens
            request.length += len(tokens)
        table = np.concatenate([request.table for request in self.requests.values()])
        lengths = np.array([request.length for request in self.requests.values()])
        return dict(zip(names, self.proposer.propose([tokens] * len(names), lengths, table), strict=True))


def taught() -> DASProposer:
    proposer = new_proposer()
    teach(proposer)
    proposer.close_epoch(0, 1)
    return proposer


def test_a_request_that_the_drafter_refuses_costs_only_its_own_drafts() -> None:
    """Its prompt holds a negative token, which a real front end does not let through."""
    proposer = taught()
    batch = Batch(proposer, ["a", "bad", "c"])
    batch.requests["bad"].table[0, 1] = -7
    for i in (0, 2, 4):
        drafts = batch.step(TEXT[i : i + 2])
        assert drafts["bad"] == [] and drafts["a"][0] == drafts["c"][0] == TEXT[i + 2]
    assert proposer.faults.counts == {"undrafted_requests": 1}
    for request in batch.requests.values():
        request.finish()
    Step(proposer, "next", identity(9)).gain([1])
    assert len(proposer.drafter) == 1 and not proposer._undrafted, "nothing is kept of requests that are gone"


def test_a_request_that_goes_back_costs_only_its_own_drafts() -> None:
    """A streaming session drops its last token; a name that is used again begins anew. The index knows neither."""
    proposer = taught()
    batch = Batch(proposer, ["a", "back", "c"])
    batch.step(TEXT[:4])
    batch.requests["back"].length -= 4
    drafts = batch.step(TEXT[4:6])
    assert drafts["back"] == [] and drafts["a"][0] == drafts["c"][0] == TEXT[6]
    assert batch.step(TEXT[6:7])["a"][0] == TEXT[7]
    assert proposer.faults.counts == {"undrafted_requests": 1}
    assert proposer.close_epoch(1, 2)["num_rollouts"] == 0
    for request in batch.requests.values():
        request.finish()
    assert proposer.close_epoch(1, 2)["num_rollouts"] == 2, "what went back is not learned from"


def test_a_step_without_a_call_takes_no_drafts_and_is_not_timed() -> None:
    """vLLM asks for none while a request is close to the end of the context, and would have every request verify a
    draft of zeros then; the time over such steps would pass for that of one.
    """
    proposer = taught()
    request = Step(proposer, "r", identity(1))
    for i in range(4):
        assert request.gain(TEXT[2 * i : 2 * i + 2]) != []
        assert proposer.runner.take_draft_token_ids() == "drafts"
    timed = proposer.drafter.planner.cost._num_steps
    for _ in range(3):
        assert proposer.runner.take_draft_token_ids() is None
    request.gain(TEXT[8:10])
    assert proposer.drafter.planner.cost._num_steps == timed
    assert proposer.runner.take_draft_token_ids() == "drafts"


@pytest.mark.parametrize("begun", [True, False])
def test_a_broken_index_turns_drafting_off_and_nothing_else(begun) -> None:
    proposer = taught()
    batch = Batch(proposer, ["a", "b"])
    if begun:
        assert batch.step(TEXT[:2])["a"] != []
    proposer.drafter.index._index = None
    for _ in range(3):
        assert batch.step(TEXT[2:4]) == {"a": [], "b": []}
    assert proposer.faults.counts == {"engines_off": 1}
    assert proposer.runner.take_draft_token_ids() is None
    assert proposer.close_epoch(1, 2) == {} and proposer.drain_metrics() == {}
    assert proposer.save("/nowhere") == {} and proposer.take_segment() == b"" and proposer.add_segment(b"x") is False


@pytest.mark.parametrize("prompt_is_token_ids", [None, [True, False, True]])
def test_a_prompt_of_embeddings_is_not_drafted_for(prompt_is_token_ids) -> None:
    """Its row of the token table holds what another request left there."""
    proposer = taught()
    request = Step(proposer, "embedded", identity(1))
    state = proposer.runner.requests["embedded"]
    state.prompt_token_ids, state.prompt_is_token_ids = prompt_is_token_ids and list(PROMPT), prompt_is_token_ids
    assert request.gain(TEXT[:2]) == [] and request.gain(TEXT[2:4]) == []
    assert len(proposer.drafter) == 0 and proposer.faults.counts == NO_FAULTS
    request.finish()
    assert Step(proposer, "next", identity(2)).gain(TEXT[:2]) == TEXT[2:10] and not proposer._undrafted


@pytest.mark.parametrize("malformed", ["x", {"problem_id": "p"}, {**identity(0), "problem_id": "\udc80"}])
def test_a_malformed_identity_is_drafted_for_by_its_prompt(malformed) -> None:
    proposer = new_proposer()
    teacher = Step(proposer, "teacher", None)
    teacher.gain(TEXT)
    teacher.finish()
    assert Step(proposer, "malformed", malformed).gain(TEXT[:2]) == TEXT[2:10]
    assert proposer.faults.counts == {"malformed_identities": 1}
