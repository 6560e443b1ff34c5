"""Mixtures of experts in a real vLLM engine on the CPU: the model that was meant, after loading and after a sync.

The engines: `moe_engine.py`, random models of two layers (`tiny_moe.py`), with ngram drafts unless named otherwise.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from . import tiny_moe

HERE = Path(__file__).parent
KINDS = tiny_moe.KINDS
DTYPES = ("float32", "bfloat16")
PATCH = "UnquantizedFusedMoEMethod.process_weights_after_loading"
MODES = ("qwen2_moe/float32/unrepaired", *[f"{kind}/{dtype}/drafts" for kind in KINDS for dtype in DTYPES],
         "qwen2_moe/float32/plain", "qwen2_moe/bfloat16/plain")  # fmt: skip
"""The unrepaired one first: repairs are made once in a process, and stay."""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders `<kind>-<seed>-<dtype>`."""
    root = tmp_path_factory.mktemp("moe")
    for kind in KINDS:
        for seed in (0, 1):
            for dtype in DTYPES:
                tiny_moe.build_model(kind, root / f"{kind}-{seed}-{dtype}", getattr(torch, dtype), seed)
    return root


@pytest.fixture(scope="module")
def engines(run_ranks, models):
    """Results by mode, each engine started once, all in one process."""
    (results,) = run_ranks(HERE / "moe_engine.py", 1, str(models), *MODES, timeout=500)
    return results


@pytest.fixture(scope="module")
def expected(models):
    """Folder -> log-probs of the prompts by transformers in float32."""
    return {folder.name: tiny_moe.log_probs(folder, tiny_moe.PROMPTS) for folder in models.iterdir()}


def differences(found: dict, expected: list[torch.Tensor]) -> torch.Tensor:
    """Of log-probs, one each prompt token."""
    return torch.cat([torch.tensor(a) - b for a, b in zip(found["prompt_logprobs"], expected, strict=True)]).abs()


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_are_those_of_transformers(engines, expected, kind) -> None:
    """After loading; after a sync of other weights, named as verl names them; after one with fused experts."""
    found = engines[f"{kind}/float32/drafts"]
    first, other = (expected[f"{kind}-{seed}-float32"] for seed in (0, 1))
    for state, weights, others in (("first", first, other), ("other", other, first), ("again", first, other)):
        assert differences(found[state], weights).max() <= 3e-5, state
        assert differences(found[state], others).max() > 0.5, f"{state}: the models would not be told apart"


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_they_are_so_to_rounding(engines, expected, kind) -> None:
    """Where rounding sends a token to another expert, its log-prob is another; so not the largest difference."""
    found = engines[f"{kind}/bfloat16/drafts"]
    for state, seed in (("first", 0), ("other", 1)):
        near, far = (differences(found[state], expected[f"{kind}-{s}-bfloat16"]) for s in (seed, 1 - seed))
        assert near.quantile(0.9) < 0.1 and near.mean() < 0.05, (state, near.mean(), near.quantile(0.9))
        assert far.mean() > 0.3, state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_sent_is_what_kernels_use(engines, kind, dtype) -> None:
    """Routers and experts among it: the read-back of the sync names none that differs."""
    found = engines[f"{kind}/{dtype}/drafts"]
    assert found["synced"]["readback_max_abs_err"] < 1e-6, found["synced"]
    assert found["live"]["repairs"][-1].endswith(PATCH)
    if dtype == "float32":
        assert found["fused_synced"]["readback_max_abs_err"] < 1e-6, found["fused_synced"]
        assert found["readback"][0] < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_two_experts_that_change_places_are_found(engines, kind) -> None:
    error, where = engines[f"{kind}/float32/drafts"]["swapped"]
    assert error > 0.1
    assert ".layers.1." in where and where.endswith(".w13")


def test_what_features_do_to_experts_is_expected_and_layers_may_say_what_they_use(engines) -> None:
    """`Engine.expected_weight` for quantized experts, and `rl_accel_used_weight` of layers that hold no plain ones."""
    found = engines["qwen2_moe/float32/drafts"]["expecting"]
    prefix = "model.layers.1.mlp.experts"
    shapes = {name: shape for name, shape in found["names"].items() if name.startswith(prefix)}
    assert sorted(shapes.values()) == [(8, 64, 64), (8, 128, 64)] and len(found["names"]) == 4
    assert found["other"][0] > 0.1, "the engine does not use what this feature wants"
    assert found["own"][0] < 1e-6
    assert found["own_wrong"][0] == pytest.approx(0.25, abs=1e-5) and ".layers.1." in found["own_wrong"][1]


def test_without_the_repair_a_sync_is_refused(engines, expected) -> None:
    """The bug that the repair is for. If this fails, vLLM has mended it and the repair can go."""
    found = engines["qwen2_moe/float32/unrepaired"]
    assert not any(symbol.endswith(PATCH) for symbol in found["live"]["repairs"])
    assert "routed_experts" in found["synced"]["failed"] or ".experts" in found["synced"]["failed"]
    assert "differs by" in found["synced"]["failed"]
    assert differences(found["other"], expected["qwen2_moe-1-float32"]).max() > 0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_drafts_change_no_token(engines, dtype) -> None:
    plain, drafted = (engines[f"qwen2_moe/{dtype}/{mode}"] for mode in ("plain", "drafts"))
    assert drafted["first"]["tokens"] == plain["first"]["tokens"]
    assert drafted["accepted"] > 20


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_with_drafts_are_those_of_transformers(engines, models, kind) -> None:
    found = engines[f"{kind}/float32/drafts"]
    assert found["accepted"] > 20
    for state, seed in (("first", 0), ("other", 1)):
        model = AutoModelForCausalLM.from_pretrained(models / f"{kind}-{seed}-float32").eval()
        for prompt, tokens in list(zip(tiny_moe.PROMPTS, found[state]["tokens"], strict=True))[:3]:
            with torch.inference_mode():
                logits_TV = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
            behind = logits_TV.max(-1).values - logits_TV.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            assert behind.max() < 1e-4, state


def test_both_training_engines_name_the_experts_of_all_alike(engines) -> None:
    """verl's FSDP engine and ours; Mixtral's too, which vLLM knows by other names."""
    for kind in KINDS:
        assert engines[f"{kind}/float32/drafts"]["exported_names"] == engines[f"{kind}/float32/drafts"]["sent_names"]
        names = engines[f"{kind}/float32/drafts"]["sent_names"]
        assert "model.layers.1.mlp.experts.7.gate_proj.weight" in names
        assert "model.layers.1.mlp.gate.weight" in names
