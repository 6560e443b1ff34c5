"""What the DAS proposer does between steps: epochs of serving, and segments that engines share. The drafter is real;
the model runner is reduced to the tables that the proposer reads."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from rl_accel.hosts.vllm import das as das_module
from rl_accel.hosts.vllm.das import DASProposer

PROMPT = [5, 6, 7]
TEXT = list(range(10, 50))


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
    )
    proposer.attach(runner)
    return proposer


class Step:
    """One request of a runner, a row of its own."""

    def __init__(self, proposer: DASProposer, name: str, identity: dict | None):
        self.proposer, self.name = proposer, name
        extra = {"rl_accel": identity} if identity else None
        params = SimpleNamespace(extra_args=extra, max_tokens=64, ignore_eos=False)
        proposer.runner.requests[name] = SimpleNamespace(sampling_params=params, output_token_ids=[])
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
