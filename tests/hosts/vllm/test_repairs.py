"""Repairs of vLLM that keep requests apart: probes find the bug and its absence, and masks follow their requests."""

from __future__ import annotations

import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.worker import gpu_input_batch
from vllm.v1.worker.gpu_input_batch import InputBatch

from rl_accel.errors import RLAccelError
from rl_accel.hosts.vllm import cpu_repair, mask_repair, moe_repair, runner_repair


@pytest.fixture
def own_methods(monkeypatch):
    """Whatever is patched in this process is put back."""
    for name in ("add_request", "swap_states"):
        monkeypatch.setattr(InputBatch, name, getattr(InputBatch, name))
    monkeypatch.setattr(gpu_input_batch, "_rl_accel_patches", {}, raising=False)


def stray_masks(seed: int, swaps: bool) -> int:
    """Let requests come, go, move and swap rows as a model runner does; return how often a row has another's mask."""
    chance, allowed, strays = random.Random(seed), {}, 0
    batch = mask_repair._batch(*[mask_repair._request(f"first{i}", [i]) for i in range(3)])
    allowed.update({f"first{i}": [i] for i in range(3)})
    for step in range(60):
        for name in chance.sample(sorted(allowed), chance.randint(0, len(allowed) - 1)):
            batch.remove_request(name)
            del allowed[name]
        while len(allowed) < 3 and chance.random() < 0.6:
            name = f"{step}-{len(allowed)}"
            allowed[name] = chance.choice([None, [chance.randrange(4)]])
            batch.add_request(mask_repair._request(name, allowed[name]))
        batch.condense()
        if swaps and len(allowed) > 1:
            batch.swap_states(*chance.sample(range(len(allowed)), 2))
        batch.refresh_metadata()
        mask = batch.sampling_metadata.allowed_token_ids_mask
        for name, tokens in allowed.items():
            want = torch.zeros(4, dtype=torch.bool) if tokens is None else torch.ones(4, dtype=torch.bool)
            want[tokens or []] = False
            strays += mask is not None and not torch.equal(mask[batch.req_id_to_index[name]], want)
    return strays


def test_masks_follow_their_requests(own_methods) -> None:
    assert any(patch.is_broken() for patch in mask_repair.PATCHES) or mask_repair._applied
    broken = [patch for patch in mask_repair.PATCHES if patch.is_broken()]
    if broken:  # the control; in a process where an engine of ours ran before, nothing is broken any more
        assert sum(stray_masks(seed, swaps=False) for seed in range(10)) > 0
        assert sum(stray_masks(seed, swaps=True) for seed in range(10)) > 0
    for patch in broken:
        patch.apply(gpu_input_batch)
        with pytest.raises(RLAccelError, match="is replaced by"):
            patch.apply(gpu_input_batch)
        assert not patch.is_broken()
    assert sum(stray_masks(seed, swaps) for seed in range(20) for swaps in (False, True)) == 0


def runner(generators: dict, discarded: list[bool]) -> SimpleNamespace:
    seen = []
    return SimpleNamespace(
        device=torch.device("cpu"),
        input_batch=SimpleNamespace(generators=generators, num_reqs=len(discarded)),
        discard_request_mask=SimpleNamespace(np=np.array([*discarded, True])),
        seen=seen,
        _bookkeeping_sync=lambda *_: seen.append(dict(generators)),
    )


def test_generators_of_complete_prompts_are_left_to_vllm() -> None:
    generators = {0: "a", 1: "b", 3: "d"}
    asked = runner(generators, [False, True, True, False])
    assert runner_repair.HideGeneratorsPatch.is_broken(asked)
    runner_repair.HideGeneratorsPatch.apply(asked)
    asked._bookkeeping_sync(1, 2)
    assert asked.seen == [{0: "a", 3: "d"}]
    assert generators == {0: "a", 1: "b", 3: "d"}


def test_generators_come_back_after_an_error() -> None:
    generators = {0: "a"}
    asked = runner(generators, [True])

    def fail(*_):
        raise RuntimeError("of vLLM")

    asked._bookkeeping_sync = fail
    runner_repair.HideGeneratorsPatch.apply(asked)
    with pytest.raises(RuntimeError, match="of vLLM"):
        asked._bookkeeping_sync()
    assert generators == {0: "a"}


@pytest.mark.parametrize(
    "patch",
    (*mask_repair.PATCHES, *runner_repair.PATCHES, *cpu_repair.PATCHES, *moe_repair.PATCHES),
    ids=lambda patch: patch.__name__,
)
def test_what_a_repair_replaces_is_there_and_takes_what_was_tested(patch) -> None:
    patch.check_signature()
    assert len(patch.__doc__) > 60 and re.match(r"vllm(-cpu)? 0\.\d+\.0", patch.versions)


def test_a_kernel_that_knows_no_precision_of_noise_is_found_and_served() -> None:
    """As in the CPU build of 0.24; the one that is installed by default takes the argument."""
    seen = {}

    def kernel(output, ends, draft_token_ids, draft_probs, target_probs, inv_q, vocab_size, NO_DRAFT_PROBS=False):
        seen.update(inv_q=inv_q, vocab_size=vocab_size, no_draft_probs=NO_DRAFT_PROBS)

    owner = SimpleNamespace(
        sample_recovered_tokens_kernel=SimpleNamespace(func=kernel),
    )
    patched = cpu_repair.RecoveredTokensKernel({(1,): kernel})
    noise = torch.ones(1, 4, dtype=torch.float64)
    patched[(1,)](None, None, None, None, None, noise, 4, NO_DRAFT_PROBS=True, USE_FP64_GUMBEL=True)
    assert seen["inv_q"].dtype == torch.float32 and seen["vocab_size"] == 4 and seen["no_draft_probs"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_repair, "vllm_rejection", owner)
        assert cpu_repair.SampleRecoveredTokensPatch.is_broken(torch.device("cpu"))
        owner.sample_recovered_tokens_kernel.func = lambda USE_FP64_GUMBEL: None
        assert not cpu_repair.SampleRecoveredTokensPatch.is_broken(torch.device("cpu"))
