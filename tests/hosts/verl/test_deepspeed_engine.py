"""The DeepSpeed engine is verl's FSDP2 engine to rounding: in processes over gloo, and in a training of its own.

Every batch has micro-batches of unequal token counts on every rank, their number changes from update to update, and
clipping is active in every update.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

ZERO = ("zero1", "zero2", "zero3")
PARITY = {"fp32": (1, 2, 4), "untied": (2,), "critic": (2,)}
SCENARIOS = {
    1: ("fp32",),
    2: (
        *("fp32", "bf16", "untied", "critic", "forward_only", "evaluation"),
        *("not_finite", "dropped_gradients", "offload", "resume", "four_bits"),
    ),
    4: ("fp32",),
}
"""World size -> what its processes run."""


@pytest.fixture(scope="session")
def ranks(run_ranks, tmp_path_factory):
    """Return the results of `deepspeed_ranks.py` for a world size, run once."""
    finished = {}

    def run(world: int) -> dict:
        if world not in finished:
            extensions = tmp_path_factory.mktemp("extensions") / "made"
            script = Path(__file__).with_name("deepspeed_ranks.py")
            results = run_ranks(script, world, *SCENARIOS[world], timeout=600, TORCH_EXTENSIONS_DIR=str(extensions))
            assert not extensions.exists(), "starting DeepSpeed on a CPU compiled an operation"
            finished[world] = results[0]
        return finished[world]

    return run


def largest_difference(some, others):
    assert some.keys() == others.keys()
    return max(float((some[name].float() - others[name].float()).abs().max()) for name in others)


def parity_cases():
    return [(scenario, world, kind) for scenario, worlds in PARITY.items() for world in worlds for kind in ZERO]


@pytest.mark.parametrize(("scenario", "world", "kind"), parity_cases())
def test_float32_updates_are_those_of_fsdp2(ranks, scenario, world, kind):
    ours, theirs = ranks(world)[scenario][kind], ranks(world)[scenario]["fsdp2"]
    assert largest_difference(ours["start"], theirs["start"]) == 0
    for mine, other in zip(ours["steps"], theirs["steps"], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=5e-6)
        assert other["grad_norm"] > 1.0, "clipping at 0.05 must be active"
    moved = largest_difference(theirs["end"], theirs["start"])
    assert moved > 2e-3
    # Adam divides by the root of the second moment: weights with gradients near zero amplify rounding.
    assert largest_difference(ours["end"], theirs["end"]) < 2e-3 * moved


@pytest.mark.parametrize("kind", ZERO)
def test_bfloat16_starts_where_fsdp2_starts(ranks, kind):
    """Sums of micro-batches are float32 at ZeRO 2 and 3 as in FSDP2, and bfloat16 (8 bits) at ZeRO 1.

    From the second update on the engines differ by rounding of weights: FSDP2 computes with the bfloat16 of a float32
    weight that differs in the last bits. Losses are printed to 8 bits, so 2**-7 is one unit.
    """
    ours, theirs = ranks(2)["bf16"][kind], ranks(2)["bf16"]["fsdp2"]
    first, expected = ours["steps"][0], theirs["steps"][0]
    assert first["loss"] == expected["loss"]
    assert first["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4 if kind == "zero1" else 2e-6)
    for mine, other in zip(ours["steps"][1:], theirs["steps"][1:], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=2**-7)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.05)
    # Exported in bfloat16, so an update of 1e-3 is compared where it is larger than half a unit of the weight.
    updates = [
        ((run["end"][name].float() - run["start"][name].float()).flatten())
        for run in (ours, theirs)
        for name in run["end"]
    ]
    half = len(updates) // 2
    mine, other = torch.cat(updates[:half]), torch.cat(updates[half:])
    assert float(torch.dot(mine, other) / (mine.norm() * other.norm())) > 0.97


@pytest.mark.parametrize("world", [1, 2, 4])
def test_states_are_shared_by_the_ranks(ranks, world):
    total = ranks(world)["fp32"]["zero1"]["shared"]["parameters"]
    for kind in ZERO:
        shared = ranks(world)["fp32"][kind]["shared"]
        assert shared["parameters"] == (0 if kind == "zero3" else total)
        assert total / world <= shared["optimizer"] <= total / world + 256


@pytest.mark.parametrize("kind", ZERO)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_reference_policy_gives_the_same_log_probs_and_has_no_optimizer(ranks, kind, dtype):
    results = ranks(2)["forward_only"]
    assert not results[kind, dtype]["has_optimizer"]
    assert torch.equal(results[kind, dtype]["log_probs"], results["fsdp2", dtype]["log_probs"])


@pytest.mark.parametrize("kind", ZERO)
def test_log_probs_between_updates(ranks, kind):
    ours, theirs = ranks(2)["evaluation"][kind], ranks(2)["evaluation"]["fsdp2"]
    assert torch.equal(ours["before"], theirs["before"])
    assert torch.allclose(ours["after"], theirs["after"], rtol=1e-5, atol=2e-5)
    assert ours["step"] == pytest.approx(theirs["step"], rel=5e-6)


def test_a_gradient_that_is_not_finite_changes_no_weight(ranks):
    results = ranks(2)["not_finite"]
    for (kind, dtype), result in results.items():
        assert not math.isfinite(result["skipped"]["grad_norm"]), (kind, dtype)
        assert largest_difference(result["before"], result["after"]) == 0
        expected = results["fsdp2", "fp32"]["next"]
        assert result["next"]["loss"] == pytest.approx(expected["loss"], rel=1e-6 if dtype == "fp32" else 0.02)
        assert result["next"]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5e-6 if dtype == "fp32" else 0.2)


def test_gradients_without_an_update_are_dropped(ranks):
    for case, result in ranks(2)["dropped_gradients"].items():
        assert result["got"] == result["expected"], case
        assert largest_difference(*result["weights"]) == 0, case


@pytest.mark.parametrize("kind", ZERO)
def test_states_that_were_offloaded_come_back(ranks, kind):
    result = ranks(2)["offload"][kind]
    assert result["got"] == result["expected"]
    assert largest_difference(*result["weights"]) == 0


@pytest.mark.parametrize("kind", ZERO)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_loaded_engine_goes_on_bit_for_bit(ranks, kind, dtype):
    result = ranks(2)["resume"][kind, dtype]
    assert largest_difference(*result["loaded"]) == 0
    assert torch.equal(*result["drawn"])
    assert result["resumed"] == result["straight"]
    assert "'world_size': 8" in result["refused"] and "same number of ranks" in result["refused"]
    assert largest_difference(*result["weights"]) == 0


def test_checkpoints_have_verls_layout(ranks):
    result = ranks(2)["resume"]["zero2", "fp32"]
    kept = {file.split("/")[0] for file in result["files"]}
    assert kept == {"global_step_2", "global_step_3"}, "max_ckpt_to_keep=2"
    for name in ("huggingface/config.json", "huggingface/tokenizer.json", "extra_state_world_size_2_rank_1.pt"):
        assert f"global_step_3/actor/{name}" in result["files"]
    saved, exported = result["loaded"][0], result["exported"]
    assert all(torch.equal(exported[name], saved[name].bfloat16()) for name in exported)


@pytest.mark.parametrize("kind", ("fsdp2", *ZERO))
def test_4_bit_communication_in_the_engine(ranks, kind):
    """Beside plain communication after three updates, and equal to the bit after a checkpoint; also in verl's own FSDP2
    engine, gradients only."""
    result = ranks(2)["four_bits"][kind]
    for ours, plain in zip(result["straight"], result["plain"], strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], rel=0.02)
        assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=0.05)
        assert ours["loss"] != plain["loss"], "nothing was quantized"
    expected, found = result["log_probs"]
    assert float((found - expected).abs().mean()) < 0.05
    assert not torch.equal(found, expected)
    stats = result["stats"]
    weights = kind in ("zero1", "zero2")
    assert stats["gradients_quantized"] and stats["gradient_intra_bytes"] > 0
    assert (stats["weight_intra_bytes"] > 0) == weights
    assert stats["weight_resyncs"] == 0
    assert result["metrics"]["rl_accel/comm/gradients_quantized"] == [1.0]
    assert (result["metrics"]["rl_accel/comm/weight_intra_bytes"][0] > 0) == weights
    assert result["metrics"]["rl_accel/comm/gradient_intra_bytes"][0] > 0
    assert result["resumed"] == result["straight"]
    assert largest_difference(*result["weights"]) == 0


@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_4_bit_weights_where_ranks_hold_shards(ranks, kind):
    """Every rank a node of its own. Rollout engines are sent the weights that forward passes compute with, not the
    optimizer's, and a resumed run is the same to the bit."""
    result = ranks(2)["four_bits"][f"{kind}_weights"]
    for ours, plain in zip(result["straight"], result["plain"], strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], rel=0.02)
        assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=0.05)
        assert ours["loss"] != plain["loss"], "nothing was quantized"
    stats = result["stats"]
    assert stats["num_nodes"] == 2 and stats["weight_resyncs"] == 0
    assert stats["weight_inter_bytes"] > 0 and stats["weight_intra_bytes"] == 0
    assert result["metrics"]["rl_accel/comm/weights_quantized"] == [1.0]
    assert result["metrics"]["rl_accel/comm/weight_inter_bytes"][0] > 0
    log_probs, sent = result["exported"]
    assert torch.equal(log_probs, result["log_probs"][1])
    assert any(not torch.equal(sent[name], weight) for name, weight in result["owned"].items())
    assert result["resumed"] == result["straight"]
    assert largest_difference(*result["weights"]) == 0
