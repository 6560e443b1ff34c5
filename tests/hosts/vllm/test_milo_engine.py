"""Low-bit experts in a real vLLM engine: the log-probs of the quantized values, live through reloads, in both modes.

The engines: `milo_engine.py`, on a random Qwen2-MoE of two layers. What they should give is asked of transformers, with
weights that this process compresses by itself.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from rl_accel.moe import plan as plans
from rl_accel.moe.budget import TensorPlan
from rl_accel.moe.compress import Method, compress

from . import milo_engine

ENGINE = Path(milo_engine.__file__)
HIDDEN, SIZE, EXPERTS, LAYERS, RANK = 64, 64, 8, 2, 4
PLAN = {
    f"model.layers.{layer}.mlp.experts.{tensor}": TensorPlan(2 + (layer + len(tensor)) % 3, tuple(range(EXPERTS)))
    for layer in range(LAYERS)
    for tensor in ("w13", "w2")
}
FUSED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    ("mlp.shared_expert.down_proj",),
)
MODES = tuple(milo_engine.SETTINGS)


def build(folder: Path, seed: int):
    """Write a random policy whose cold samples repeat themselves, so that drafts are accepted."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen2MoeConfig(
        vocab_size=300, hidden_size=HIDDEN, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=2, moe_intermediate_size=SIZE, shared_expert_intermediate_size=64, num_experts=EXPERTS,
        num_experts_per_tok=2, norm_topk_prob=True, max_position_embeddings=512, initializer_range=0.2,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config).to(torch.float32).eval()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 0.02
        layer.mlp.experts.down_proj.data *= 0.3
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """The policy and the one that is sent later, as transformers has them; and their folder."""
    folder = tmp_path_factory.mktemp("moe")
    plans.save(PLAN, folder / "plan.json")
    return folder, {"": build(folder / "model", 0), "moved": build(folder / "model-moved", 1)}


@pytest.fixture(scope="module")
def engines(run_ranks, policies):
    """Results by mode, each engine started once, all in one process."""
    (results,) = run_ranks(ENGINE, 1, str(policies[0] / "model"), *MODES, timeout=500)
    return results


def quantized(
    policy, bits: int = 3, group_size: int = 64, linears: bool = False, plan: dict | None = None, shards: int = 1
):
    """Return a copy of a policy with the values that an engine should compute with."""
    found = copy.deepcopy(policy)
    weights = dict(found.named_parameters())

    def hat(w_ENK: torch.Tensor, width: int, ranks: tuple[int, ...] | None) -> torch.Tensor:
        method = Method(alternations=4)
        return compress(w_ENK.contiguous(), width, group_size, ranks or [RANK] * len(w_ENK), method).weight()

    def experts(name: str, planned: TensorPlan | None) -> None:
        """Of w13, gate and up are divided each; of w2, what comes in."""
        width, ranks = (planned.bits, planned.ranks) if planned else (bits, None)
        w = weights[name].data
        if name.endswith("down_proj"):
            return w.copy_(torch.cat([hat(part, width, ranks) for part in w.chunk(shards, -1)], -1))
        halves = [torch.cat(parts, 1) for parts in zip(*(half.chunk(shards, 1) for half in w.chunk(2, 1)), strict=True)]
        new = [hat(half, width, ranks).chunk(2, 1) for half in halves]
        w.copy_(torch.cat([gate for gate, _ in new] + [up for _, up in new], 1))

    def fused(names: list[str]) -> None:
        parts = [weights[name].data for name in names]
        new = hat(torch.cat(parts)[None], bits, None)[0]
        for part, values in zip(parts, new.split([len(part) for part in parts]), strict=True):
            part.copy_(values)

    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name, tensor in (("gate_up_proj", "w13"), ("down_proj", "w2")):
            experts(f"{prefix}.mlp.experts.{name}", (plan or {}).get(f"{prefix}.mlp.experts.{tensor}"))
        for parts in FUSED if linears else ():
            fused([f"{prefix}.{part}.weight" for part in parts])
    return found


@torch.no_grad()
def difference(policy, result: dict) -> float:
    """Return the largest difference of an engine's log-probs of its tokens to those of transformers."""
    worst = 0.0
    for index, (tokens, log_probs) in enumerate(zip(result["tokens"], result["logprobs"], strict=True)):
        prompt = milo_engine.prompt(index)
        logits = policy(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        worst = max(worst, float((wanted - torch.tensor(log_probs)).abs().max()))
    return worst


CASES: dict[str, dict] = {
    "plain": {},
    "packed": {},
    "packed_all2": {"bits": 2, "linears": True},
    "warm": {"plan": PLAN},
    "tp2": {"group_size": 32, "shards": 2},
}


@pytest.mark.parametrize("mode", CASES)
def test_log_probs_are_those_of_the_quantized_values(engines, policies, mode) -> None:
    policy = policies[1][""]
    assert difference(quantized(policy, **CASES[mode]), engines[mode]) < 5e-5
    assert difference(policy, engines[mode]) > 0.05, "the quantization is in force"
    assert difference(policy, engines["stock"]) < 5e-5


@pytest.mark.parametrize("mode", ["plain", "packed", "packed_all2"])
def test_weights_that_come_later_are_quantized_anew(engines, policies, mode) -> None:
    """Also from several buckets; and the first ones, sent again, give the same codes and bits."""
    moved, back = engines[mode]["moved"], engines[mode]["back"]
    assert difference(quantized(policies[1]["moved"], **CASES[mode]), moved) < 5e-5
    assert difference(quantized(policies[1][""], **CASES[mode]), moved) > 0.5
    assert (back["tokens"], back["logprobs"]) == (engines[mode]["tokens"], engines[mode]["logprobs"])
    first, last = engines[mode]["states"][0], back["states"][0]
    assert len(first["codes"]) == len(last["codes"]) == (0 if mode == "plain" else 3 * 2 * LAYERS)
    assert all(torch.equal(a, b) for a, b in zip(first["codes"], last["codes"], strict=True))
    assert first["storage"] == last["storage"], "addresses that a captured graph would have kept"


@pytest.mark.parametrize("mode", milo_engine.RELOADED)
def test_the_read_back_sees_the_quantized_values_in_the_kernels(engines, mode) -> None:
    for name in ("moved", "back"):
        sync = engines[mode][name]["states"][0]["sync"]
        assert 0 <= sync["readback_max_abs_err"] <= 1e-5
        assert engines[mode][name]["states"][0]["metrics"]["moe"]["version"] == (2 if name == "moved" else 3)


def test_packed_and_materialized_experts_sample_the_same_tokens(engines) -> None:
    assert engines["plain"]["tokens"] == engines["packed"]["tokens"]
    for state in ("moved", "back"):
        assert engines["plain"][state]["tokens"] == engines["packed"][state]["tokens"], state


def test_drafts_chunks_and_prefix_caches_change_no_token(engines) -> None:
    assert engines["ngram"]["tokens"] == engines["plain"]["tokens"]
    assert engines["packed_ngram"]["tokens"] == engines["packed"]["tokens"]
    for mode in ("ngram", "packed_ngram"):
        assert engines[mode]["states"][0]["counts"]["num_accepted_tokens"] > 20, mode


def test_packed_experts_hold_the_bytes_that_are_reported(engines) -> None:
    """3 bits, scale and offset of 16 bits per 64, 4-bit factors of rank 4 with a scale per 64."""
    weights = LAYERS * EXPERTS * 3 * HIDDEN * SIZE
    assert engines["plain"]["states"][0]["bytes"] == engines["stock"]["states"][0]["bytes"] == 4 * weights
    per_rank = {"w13": HIDDEN + 2 * SIZE, "w2": HIDDEN + SIZE}
    factors = LAYERS * EXPERTS * RANK * sum(width * (4 / 8 + 2 / 64) for width in per_rank.values())
    starts = LAYERS * 2 * (EXPERTS + 1) * 4
    state = engines["packed"]["states"][0]
    assert state["bytes"] == 3.5 * weights / 8 + factors + starts
    assert state["live"]["features"]["moe"]["bits_per_weight"] == pytest.approx(8 * state["bytes"] / weights, abs=1e-3)
    assert state["methods"] == ["PackedExperts"] * LAYERS
    speed = state["live"]["features"]["moe"]["speed_against_stock"]
    assert speed.keys() == {"b1", "b8"} and all(0 < ratio < 100 for ratio in speed.values())
    assert "speed_against_stock" not in engines["plain"]["states"][0]["live"]["features"]["moe"], "it is stock"
    assert engines["plain"]["states"][0]["methods"] == ["MaterializedExperts"] * LAYERS
    planned = [tensor.bits for tensor in PLAN.values()]
    tensors = engines["warm"]["states"][0]["live"]["features"]["moe"]["tensors"]
    assert tensors == {bits: planned.count(bits) for bits in (2, 3, 4)}


def test_in_bfloat16_they_agree_but_for_rounding(engines, policies) -> None:
    """Random experts route on a knife's edge, so single tokens may differ by much; most do not."""
    wanted = quantized(policies[1][""].to(torch.bfloat16).float())
    prompt, tokens, log_probs = milo_engine.prompt(0), engines["bf16"]["tokens"][0], engines["bf16"]["logprobs"][0]
    with torch.no_grad():
        logits = wanted(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
    found = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0] - torch.tensor(log_probs)
    assert found.abs().median() < 0.05


def test_both_shards_hold_their_part(engines) -> None:
    """Groups of 32 divide an expert's half of 32; its compensators belong to a shard."""
    states = engines["tp2"]["states"]
    assert len(states) == 2 and states[0]["bytes"] == states[1]["bytes"]
    assert not torch.equal(states[0]["codes"][0], states[1]["codes"][0])


def test_a_warm_refresh_takes_one_alternation(engines, policies) -> None:
    """The first weights that are sent are made cold, for those that were loaded may be placeholders."""
    states = {name: engines["warm"][name] for name in ("moved", "back")}
    assert [states[name]["states"][0]["metrics"]["moe"]["alternations"] > 1 for name in states] == [True, False]
    assert difference(quantized(policies[1]["moved"], **CASES["warm"]), states["moved"]) < 5e-5
    assert difference(policies[1][""], states["back"]) > 0.05


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("unasked", "needs vLLM's quantization=milo"),
        ("off", "quantization=milo is lossy and needs its settings"),
    ],
)
def test_what_is_not_live_stops_the_engine(engines, mode, message) -> None:
    assert message in engines[mode]["refused"]
