"""Rollout engines reduced to their drafting: Ray actors with real proposers, asked as verl's servers are.

A proposer reads two tables of vLLM's model runner; a runner of these tables stands in for it, so no model is needed.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from rl_accel.draft.hosts.proposer import DASProposer
from rl_accel.hosts.vllm.faults import Faults

PROMPT = [5, 6, 7]


def new_proposer(tokenizer: str = "none", history_gib: float = 2.0, rank: int = 0) -> DASProposer:
    model_config = SimpleNamespace(
        max_model_len=4096,
        tokenizer=tokenizer,
        get_vocab_size=lambda: 300_000,
        hf_text_config=SimpleNamespace(eos_token_id=2),
        try_get_generation_config=dict,
        enforce_eager=True,
    )
    config = SimpleNamespace(
        additional_config={"rl_accel": {"draft": {"history_gib": history_gib, "cross_problems": False}}},
        speculative_config=SimpleNamespace(num_speculative_tokens=8),
        model_config=model_config,
        parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_index=rank),
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=[]),
        device_config=SimpleNamespace(device_type="cpu"),
    )
    proposer = DASProposer(config)
    batch = SimpleNamespace(req_ids=[], num_prompt_tokens=[])
    proposer.attach(
        SimpleNamespace(requests={}, input_batch=batch, take_draft_token_ids=lambda: "drafts", rl_accel_faults=Faults())
    )
    return proposer


def sample(proposer: DASProposer, problem: str, tokens: list[int], ends: bool = True) -> list[int]:
    """One request of the runner that samples `tokens` in one step; returns the draft that followed."""
    name, runner = f"{problem} {len(tokens)}", proposer.runner
    identity = {"problem_id": problem, "sample_index": 0, "step": 0, "validate": False}
    params = SimpleNamespace(extra_args={"rl_accel": identity}, max_tokens=4000, ignore_eos=False)
    runner.requests[name] = SimpleNamespace(
        sampling_params=params, output_token_ids=list(tokens), prompt_token_ids=PROMPT, prompt_is_token_ids=None
    )
    runner.input_batch.req_ids, runner.input_batch.num_prompt_tokens = [name], [len(PROMPT)]
    text = np.array([PROMPT + list(tokens)], np.int32)
    draft = proposer.propose([list(tokens)], np.array([text.shape[1]]), text)[0]
    if ends:
        del runner.requests[name]
    return draft


class Engine:
    """A server of verl: two ranks answer, of which the second one does not draft."""

    def __init__(self):
        self.begin()

    def begin(self, tokenizer: str = "none", history_gib: float = 2.0) -> None:
        """Be a new engine."""
        self.ranks = [new_proposer(tokenizer, history_gib), new_proposer()]
        self.ranks[1].drafter = None

    async def collective_rpc(self, method: str, timeout: Any = None, args: tuple = (), kwargs: Any = None) -> list:
        if method == "rl_accel_drain":
            return [{"counts": {}, "features": {"draft": rank.drain_metrics()}} for rank in self.ranks]
        feature, name, arguments = args
        assert (method, feature) == ("rl_accel_call", "draft")
        return [getattr(rank, name)(*arguments) for rank in self.ranks]

    async def sample(self, problem: str, tokens: list[int], ends: bool = True) -> list[int]:
        return sample(self.ranks[0], problem, tokens, ends)

    async def segments(self) -> list[dict]:
        self.ranks[0].drafter.index.check_integrity()
        return self.ranks[0].drafter.index.segments()
