"""The exact samplers against vLLM's own on the same logits, log-probs in every mode; and identities of rows."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from vllm import SamplingParams
from vllm.platforms import current_platform
from vllm.v1.sample import rejection_sampler as vllm_rejection
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from rl_accel.errors import RLAccelError
from rl_accel.hosts.vllm import cpu_repair
from rl_accel.hosts.vllm.faults import Faults
from rl_accel.hosts.vllm.self_test import sampling_metadata
from rl_accel.sampling.hosts import row_identity
from rl_accel.sampling.hosts.exact_sampler import ExactRejectionSampler, ExactSampler
from rl_accel.sampling.hosts.row_identity import RowSource, StepRows
from rl_accel.sampling.keys import request_key

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="the samplers are driven on CPU tensors")

MODES = ("raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits")
BATCH, VOCAB_SIZE, NUM_DRAFTS = 6, 32, 2
GREEDY = [False, True, False, False, True, False]


@pytest.fixture(autouse=True)
def repaired_cpu(monkeypatch, cpu_kernels):
    monkeypatch.setattr(vllm_rejection, "expand_batch_to_tokens", cpu_repair.expand_batch_to_tokens)


def mixed_batch():
    """Greedy and random requests with different temperatures, top-k and top-p; all log-probs asked for."""
    temperature = torch.tensor([0.7, 0.0, 1.0, 1.6, 0.0, 0.3])
    top_k = torch.tensor([VOCAB_SIZE, 5, 7, VOCAB_SIZE, VOCAB_SIZE, 3], dtype=torch.int32)
    top_p = torch.tensor([1.0, 1.0, 0.8, 0.6, 1.0, 0.9])
    batch = sampling_metadata(temperature, top_k, top_p)
    return replace(batch, all_random=False, max_num_logprobs=VOCAB_SIZE)


def samplers(mode: str):
    """vLLM's pair and ours; use_fp64_gumbel keeps vLLM's plain sampler on CPU out of torch.compile."""
    rows = RowSource()
    stock = Sampler(mode, use_fp64_gumbel=True)
    exact = ExactSampler(stock, rows)
    keys = torch.arange(BATCH)
    request_T = keys.repeat_interleave(NUM_DRAFTS)
    rows.step = StepRows(keys, keys * 5, request_T, request_T * 3, request_T)
    return (stock, RejectionSampler(stock)), (
        exact,
        ExactRejectionSampler(exact, None, torch.device("cpu"), rows),
    )


def same_logprobs(ours, vllms) -> None:
    """Column 0 is the sampled token; the others are all tokens in order of probability, whatever was sampled."""
    assert torch.equal(ours.logprobs[:, 1:], vllms.logprobs[:, 1:])
    for row, ids, sampled, rank in zip(
        ours.logprobs,
        ours.logprob_token_ids,
        ours.logprob_token_ids[:, 0],
        ours.selected_token_ranks,
        strict=True,
    ):
        assert row[0] == row[1:][ids[1:] == sampled]
        assert rank == (row[1:] >= row[0]).sum()


@pytest.mark.parametrize("mode", MODES)
def test_plain_logprobs_and_greedy_rows_are_vllms(mode):
    logits = torch.randn(BATCH, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) * 2
    (stock, _), (exact, _) = samplers(mode)
    want, got = (sampler(logits.clone(), mixed_batch()) for sampler in (stock, exact))
    same_logprobs(got.logprobs_tensors, want.logprobs_tensors)
    assert got.sampled_token_ids.dtype == want.sampled_token_ids.dtype
    greedy = torch.tensor(GREEDY)
    assert torch.equal(got.sampled_token_ids[greedy, 0], logits.argmax(dim=1)[greedy].int())
    assert torch.equal(exact(logits.clone(), mixed_batch()).sampled_token_ids, got.sampled_token_ids)


@pytest.mark.parametrize("mode", MODES)
def test_speculative_logprobs_and_greedy_rows_are_vllms(mode):
    logits = torch.randn(BATCH * (NUM_DRAFTS + 1), VOCAB_SIZE, generator=torch.Generator().manual_seed(1)) * 2
    rows = torch.arange(len(logits), dtype=torch.int32).view(BATCH, -1)
    best = logits.argmax(dim=1).view(BATCH, -1)
    metadata = SpecDecodeMetadata.make_dummy(best[:, :NUM_DRAFTS].tolist(), torch.device("cpu"))
    metadata.target_logits_indices, metadata.bonus_logits_indices = rows[:, :-1].reshape(-1), rows[:, -1]
    (_, stock), (_, exact) = samplers(mode)
    want, got = (sampler(metadata, None, logits.clone(), mixed_batch()) for sampler in (stock, exact))
    assert torch.equal(got.logprobs_tensors.logprobs[:, 1:], want.logprobs_tensors.logprobs[:, 1:])
    for request in range(BATCH):
        if GREEDY[request]:
            assert got.sampled_token_ids[request].tolist() == best[request].tolist()
    assert got.sampled_token_ids.shape == want.sampled_token_ids.shape


def test_draft_probabilities_go_to_vllms_rejection_sampling(monkeypatch):
    """Drafts that were sampled may not be verified by comparison: it would be right, but accept less."""
    _, (_, exact) = samplers("raw_logprobs")
    metadata = SpecDecodeMetadata.make_dummy([[1, 2]] * BATCH, torch.device("cpu"))
    monkeypatch.setattr(exact, "verify", lambda *_: pytest.fail("compared sampled drafts"))
    probs = torch.full((BATCH * NUM_DRAFTS, VOCAB_SIZE), 1 / VOCAB_SIZE)
    logits = torch.zeros(BATCH * (NUM_DRAFTS + 1), VOCAB_SIZE)
    assert exact(metadata, probs, logits, mixed_batch()).sampled_token_ids.shape == (BATCH, NUM_DRAFTS + 1)


def test_sampling_without_an_identity_is_an_error():
    _, (exact, _) = samplers("raw_logprobs")
    exact.topk_topp_sampler.rows.step = None
    with pytest.raises(RLAccelError, match="outside of _sample"):
        exact(torch.zeros(BATCH, VOCAB_SIZE), mixed_batch())


def request(req_id: str = "a-1", prompt=(1, 2), seed=None, identity=None) -> CachedRequestState:
    params = SamplingParams(seed=seed, extra_args={"rl_accel": identity} if identity else None)
    return CachedRequestState(req_id, list(prompt), [], params, None, ([],), 0, [])


def key_of(asked: CachedRequestState, faults: Faults | None = None) -> int:
    return row_identity.key_of(asked, 5, faults or Faults())


def test_key_of_our_requests_is_their_identity():
    identity = {"problem_id": "p", "sample_index": 2, "step": 9, "validate": True}
    assert key_of(request(identity=identity)) == request_key(5, "p", 2, 9, True)
    assert key_of(request("b-2", (9,), 3, identity)) == request_key(5, "p", 2, 9, True)
    assert key_of(request("3_c-1", identity=identity)) == request_key(5, "p", 5, 9, True)
    assert key_of(request(identity={**identity, "call": 4})) == request_key(5, "p", 2, 9, True, 4)


def test_key_of_anonymous_requests():
    keys = [
        key_of(request(*arguments))
        for arguments in (("a-1", (1, 2), 3), ("b-1", (1, 2), 3), ("a-1", (1, 2), 4), ("a-1", (1, 3), 3))
    ]
    assert keys[0] == keys[1] and len(set(keys)) == 3, "named by seed and prompt"
    assert key_of(request("a-1")) != key_of(request("a-2")), "no seed: independent"


def test_key_is_computed_once_and_goes_with_the_request():
    first = request(seed=1)
    key = key_of(first)
    first.sampling_params.seed = 2
    assert key_of(first) == key
    assert key_of(request(seed=2)) != key, "a new request of the same id gets its own key"


@pytest.mark.parametrize(
    "identity", ["x", 7, [1], {"problem_id": "p", "step": 1}, {"problem_id": "p", "sample_index": 1 << 99, "step": 1}]
)
def test_a_malformed_identity_is_served_as_anonymous_and_counted_once(identity):
    faults = Faults()
    asked = request(seed=3, identity=identity)
    assert key_of(asked, faults) == key_of(asked, faults) == key_of(request(seed=3))
    assert row_identity.identity_of(asked, faults) is None
    assert faults.counts["malformed_identities"] == 1


@pytest.mark.parametrize("name", ["9" * 5000 + "_x", "\udc80", "", "_", "\u0663_x", "-1_x", "1" * 6 + "_x"])
def test_any_request_id_has_a_key(name):
    identity = {"problem_id": "p", "sample_index": 0, "step": 1, "validate": False}
    assert isinstance(key_of(request(name)), int)
    assert isinstance(key_of(request(name, identity=identity)), int)


def test_what_a_request_carries_beside_an_identity_does_not_matter():
    for extra_args in (None, {}, {"rl_accel": None}, {"other": 1}, "x"):
        asked, faults = request(seed=3), Faults()
        asked.sampling_params.extra_args = extra_args
        assert key_of(asked, faults) == key_of(request(seed=3))
        assert not any(faults.counts.values())
    embedded = request(seed=3)
    embedded.prompt_token_ids = None
    assert isinstance(key_of(embedded), int)


def test_rows_of_a_speculating_step():
    """Three requests at positions 10, 20 and 30 with 2, 0 and 1 drafts; the middle one prefills 3 tokens."""
    requests = {name: request(name, seed=index) for index, name in enumerate("xyz")}
    runner = SimpleNamespace(
        device=torch.device("cpu"),
        requests=requests,
        input_batch=SimpleNamespace(req_ids=["x", "y", "z"], num_reqs=3),
        positions=torch.tensor([10, 11, 12, 20, 21, 22, 30, 31, -9]),
        rl_accel_faults=Faults(),
        query_start_loc=SimpleNamespace(gpu=torch.tensor([0, 3, 6, 8, 8], dtype=torch.int32)),
    )
    keys = [row_identity.key_of(requests[name], 0, Faults()) for name in "xyz"]
    plain = row_identity.rows_of_step(runner, None, 0)
    assert plain.keys_B.tolist() == keys and plain.positions_B.tolist() == [13, 23, 32]

    metadata = SpecDecodeMetadata.make_dummy([[5, 6], [], [7]], runner.device)
    metadata.logits_indices = torch.tensor([0, 1, 2, 5, 6, 7])
    metadata.target_logits_indices, metadata.bonus_logits_indices = (
        torch.tensor([0, 1, 4]),
        torch.tensor([2, 3, 5]),
    )
    rows = row_identity.rows_of_step(runner, metadata, 0)
    assert rows.positions_B.tolist() == [13, 23, 32] and rows.keys_B.tolist() == keys
    assert rows.positions_T.tolist() == [11, 12, 31] and rows.request_T.tolist() == [0, 0, 2]
    assert rows.keys_T.tolist() == [keys[0], keys[0], keys[2]]
