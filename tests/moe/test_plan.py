"""Plans from checkpoints on disk, what a refresher makes of them, and its state on disk."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rl_accel.errors import MoEError
from rl_accel.moe import checkpoint, frequencies, store
from rl_accel.moe import plan as plans
from rl_accel.moe.budget import TensorPlan
from rl_accel.moe.compress import compress
from rl_accel.moe.config import MoEConfig
from rl_accel.moe.refresh import Refresher
from rl_accel.quickstart import problems
from rl_accel.quickstart.deep import MOE_POLICY

EXPERTS, HIDDEN, SIZE = 4, 64, 128
NAME = "model.layers.0.mlp.experts.w2"


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """Two layers of experts in the names of Qwen2-MoE, in two files."""
    folder = tmp_path_factory.mktemp("policy")
    for layer in range(2):
        prefix, parts = f"model.layers.{layer}", {}
        for expert in range(EXPERTS):
            for part, shape in (("gate", (SIZE, HIDDEN)), ("up", (SIZE, HIDDEN)), ("down", (HIDDEN, SIZE))):
                seed = 1000 * layer + 10 * expert + len(part)
                parts[f"{prefix}.mlp.experts.{expert}.{part}_proj.weight"] = gaussian(*shape, seed=seed)
        parts[f"{prefix}.mlp.gate.weight"] = gaussian(EXPERTS, HIDDEN)
        parts[f"{prefix}.mlp.shared_expert_gate.weight"] = gaussian(1, HIDDEN)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            parts[f"{prefix}.self_attn.{name}.weight"] = gaussian(HIDDEN, HIDDEN, seed=len(name))
        save_file(parts, folder / f"model-{layer}.safetensors")
    return folder


def test_experts_are_stacked_as_an_engine_holds_them(policy):
    found = dict(checkpoint.tensors(policy))
    assert list(found) == [f"model.layers.{layer}.mlp.experts.{t}" for layer in range(2) for t in ("w2", "w13")]
    w13 = found["model.layers.1.mlp.experts.w13"]
    assert w13.shape == (EXPERTS, 2 * SIZE, HIDDEN)
    assert torch.equal(w13[3, :SIZE], gaussian(SIZE, HIDDEN, seed=1000 + 30 + 4))
    assert torch.equal(w13[3, SIZE:], gaussian(SIZE, HIDDEN, seed=1000 + 30 + 2))
    linears = [name for name in dict(checkpoint.tensors(policy, linears=True)) if not checkpoint.is_expert(name)]
    assert linears == [f"model.layers.{layer}.self_attn.{n}" for layer in range(2) for n in ("o_proj", "qkv_proj")]


def test_stacked_and_mixtral_names_are_read_too(tmp_path):
    parts = {f"model.layers.0.block_sparse_moe.experts.{e}.w{i}.weight": gaussian(64, 64, seed=10 * e + i)
             for e in range(2) for i in (1, 2, 3)}  # fmt: skip
    parts["model.layers.1.mlp.experts.gate_up_proj"] = gaussian(2, 128, 64)
    parts["model.layers.1.mlp.experts.down_proj"] = gaussian(2, 64, 64)
    save_file(parts, tmp_path / "model.safetensors")
    found = dict(checkpoint.tensors(tmp_path))
    mixtral = found["model.layers.0.block_sparse_moe.experts.w13"]
    assert torch.equal(mixtral[1], torch.cat([gaussian(64, 64, seed=11), gaussian(64, 64, seed=13)]))
    assert torch.equal(found["model.layers.1.mlp.experts.w13"], parts["model.layers.1.mlp.experts.gate_up_proj"])


def test_nothing_to_plan_from_is_an_error(tmp_path):
    with pytest.raises(MoEError, match=r"no \*\.safetensors"):
        dict(checkpoint.tensors(tmp_path))
    save_file({"model.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    with pytest.raises(MoEError, match="no experts"):
        dict(checkpoint.tensors(tmp_path))


def test_every_policy_gives_a_plan(policy, tmp_path):
    uniform = plans.make(MoEConfig(rank=6), policy)
    assert set(uniform.values()) == {TensorPlan(3, (6,) * EXPERTS)}
    linears = plans.make(MoEConfig(rank=6, linears=True, rank_linears=24), policy)
    assert linears["model.layers.0.self_attn.qkv_proj"] == TensorPlan(3, (24,))
    kurtosis = plans.make(MoEConfig(rank=6, ranks="kurtosis"), policy)
    assert all(sum(tensor.ranks) == 6 * EXPERTS for tensor in kurtosis.values())
    counts = tmp_path / "counts.json"
    counts.write_text(json.dumps({f"model.layers.{layer}.mlp.experts": [1, 1, 1, 5] for layer in range(2)}))
    frequency = plans.make(MoEConfig(rank=6, ranks="frequency", frequencies=str(counts)), policy)
    assert set(frequency.values()) == {TensorPlan(3, (3, 3, 3, 15))}
    budget = plans.make(MoEConfig(ranks="budget", budget_bits=4.5), policy)
    assert {tensor.bits for tensor in budget.values()} == {4}
    counts.write_text("{}")
    with pytest.raises(MoEError, match="no counts for"):
        plans.make(MoEConfig(ranks="frequency", frequencies=str(counts)), policy)


def test_routing_is_counted_over_what_the_policy_samples(tmp_path):
    """By the command, against routers that a hook listens to; a plan can be made of the file."""
    prompts, counts = tmp_path / "train.parquet", tmp_path / "counts.json"
    rows = [[{"role": "user", "content": problem.question}] for problem in problems.generate(2, seed=0)]
    pq.write_table(pa.table({"prompt": rows}), prompts)
    command = [sys.executable, "-m", "rl_accel.moe.frequencies", "quickstart_moe", str(prompts), str(counts)]
    subprocess.run([*command, "tokens=8"], check=True, timeout=120)
    found = plans.read_counts(counts)
    model = AutoModelForCausalLM.from_pretrained(MOE_POLICY)
    tokenizer = AutoTokenizer.from_pretrained(MOE_POLICY)
    texts = list(frequencies.sample(model, tokenizer, str(prompts), {**frequencies.OPTIONS, "tokens": 8}))
    assert sum(found["model.layers.0.mlp.experts"]) == 2 * sum(text.shape[1] for text in texts), "two a token"
    heard = {}
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda _, inputs, output, name=name: heard.setdefault(name, []).append(
                (inputs[0].flatten(0, -2) @ _.weight.T).topk(2).indices.flatten()))  # fmt: skip
    with torch.no_grad():
        for text in texts:
            model(text)
    assert len(heard) == len(found) > 1
    for name, choices in heard.items():
        expected = torch.bincount(torch.cat(choices), minlength=8).tolist()
        assert found[name.removesuffix("gate") + "experts"] == expected
    plan = plans.make(MoEConfig(rank=6, ranks="frequency", frequencies=str(counts)), MOE_POLICY)
    assert all(sum(tensor.ranks) == 6 * 8 for tensor in plan.values())
    assert len({tensor.ranks for tensor in plan.values()}) > 1
    with pytest.raises(MoEError, match="no option"):
        frequencies.main(["quickstart_moe", str(prompts), str(counts), "token=8"])
    with pytest.raises(MoEError, match="no column of prompts"):
        list(frequencies.sample(model, tokenizer, str(counts), frequencies.OPTIONS))


def test_a_plan_survives_the_disk_and_damage_is_named(tmp_path):
    plan = {"a": TensorPlan(3, (1, 2)), "b": TensorPlan(4, (0,))}
    plans.save(plan, tmp_path / "plan.json")
    assert plans.load(tmp_path / "plan.json") == plan
    for text in ("", "[]", '{"a": {"bits": 3}}', '{"a": 3}'):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(MoEError, match="no plan"):
            plans.load(tmp_path / "plan.json")


def test_a_cold_refresh_is_a_function_of_the_weights():
    w, other = gaussian(2, 64, 128), gaussian(2, 64, 128, seed=1)
    fresh, used = Refresher(MoEConfig(rank=4)), Refresher(MoEConfig(rank=4))
    used.refresh(NAME, other)
    found, again = fresh.refresh(NAME, w), used.refresh(NAME, w)
    assert torch.equal(found.matrix.codes, again.matrix.codes)
    assert torch.equal(found.factors.u_codes, again.factors.u_codes)
    assert torch.equal(fresh.expected(NAME, w), found.weight())
    assert (fresh.versions[NAME], used.versions[NAME]) == (1, 2)


def test_a_warm_refresh_goes_on_and_its_state_is_restored(tmp_path):
    w = gaussian(2, 64, 128)
    settings = MoEConfig(rank=4, refresh="warm")
    first, second = Refresher(settings), Refresher(settings)
    first.refresh(NAME, w)
    first.save(tmp_path / "state.safetensors")
    moved = w + 1e-3 * gaussian(2, 64, 128, seed=2)
    expected = first.refresh(NAME, moved)
    second.restore(tmp_path / "state.safetensors")
    found = second.refresh(NAME, moved)
    assert torch.equal(found.matrix.codes, expected.matrix.codes)
    assert torch.equal(found.factors.v_codes, expected.factors.v_codes)
    assert (found.alternations_E == 1).all()
    cold = Refresher(MoEConfig(rank=4)).refresh(NAME, moved)
    assert not torch.equal(cold.matrix.codes, found.matrix.codes)
    assert (found.errors_E < 1.02 * cold.errors_E).all()


def test_tensors_survive_the_disk_and_damage_is_named(tmp_path):
    tensors = {
        "a": compress(gaussian(2, 64, 96), 2, 32, [3, 0]),
        "b": compress(gaussian(1, 64, 64), 4, 64, [0]),
    }
    file = tmp_path / "experts.safetensors"
    store.save(tensors, file, 7)
    assert store.version(file) == 7
    for name, tensor in store.load(file).items():
        assert torch.equal(tensor.weight(), tensors[name].weight())
        assert tensor.memory_bytes() == tensors[name].memory_bytes()
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole.replace(b"rl_accel.moe/1", b"rl_accel.moe/9")):
        file.write_bytes(damaged)
        with pytest.raises(MoEError):
            store.load(file)


def test_a_stale_tensor_is_named():
    refresher = Refresher(MoEConfig(rank=0))
    for name in ("a", "b", "a"):
        refresher.refresh(name, gaussian(1, 64, 64))
    with pytest.raises(MoEError, match="b and 0 other"):
        refresher.check_version(2)


def test_a_plan_must_fit(tmp_path):
    plans.save({"a": TensorPlan(3, (4,))}, tmp_path / "plan.json")
    refresher = Refresher(MoEConfig(plan=str(tmp_path / "plan.json")))
    with pytest.raises(MoEError, match="1 ranks for a, which has 2"):
        refresher.refresh("a", gaussian(2, 64, 64))
    with pytest.raises(MoEError, match="lacks it"):
        refresher.refresh("b", gaussian(1, 64, 64))
    with pytest.raises(MoEError, match="needs a plan"):
        Refresher(MoEConfig(ranks="budget", budget_bits=4.0)).refresh("b", gaussian(1, 64, 64))


def test_experts_that_live_elsewhere_leave_the_plan(tmp_path):
    plans.save({"x.w2": TensorPlan(3, (1, 2, 3, 4))}, tmp_path / "plan.json")
    refresher = Refresher(MoEConfig(plan=str(tmp_path / "plan.json")))
    refresher.local("x.w2", {1: 0, 3: 1})
    assert refresher.plan["x.w2"].ranks == (2, 4)
