"""The mixture-of-experts policy in the package, and that upcycling keeps what a dense model computes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from rl_accel.errors import ConfigError
from rl_accel.quickstart.deep import MOE_POLICY, POLICY
from rl_accel.quickstart.problems import generate
from rl_accel.quickstart.upcycle import upcycle

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("make_moe_policy", SCRIPTS / "make_moe_policy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPTS))


@pytest.mark.parametrize(("experts", "chosen", "shared"), [(8, 2, 128), (3, 3, 64), (5, 1, 320)])
def test_an_upcycled_policy_computes_what_the_dense_one_does(experts, chosen, shared, script) -> None:
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32).eval()
    moe = upcycle(dense, experts, chosen, shared, router_std=0.3).eval()
    assert 0 < script.check_start(moe, dense) <= 1e-4
    script.move_apart(moe, 0.3)
    with pytest.raises(AssertionError, match="upcycling moved a logit"):
        script.check_start(moe, dense)


def test_without_neurons_for_one_kind_of_experts_it_is_refused() -> None:
    dense = Qwen2ForCausalLM(AutoConfig.from_pretrained(POLICY))
    for shared in (0, 384):
        with pytest.raises(ConfigError, match=f"shared={shared} neurons"):
            upcycle(dense, 4, 2, shared, router_std=0.3)


def test_size_and_architecture() -> None:
    model = AutoModelForCausalLM.from_pretrained(MOE_POLICY)
    assert sum(path.stat().st_size for path in MOE_POLICY.iterdir()) <= 8_000_000
    assert model.config.architectures == ["Qwen2MoeForCausalLM"] and model.dtype == torch.bfloat16
    assert (model.config.num_experts, model.config.num_experts_per_tok) == (8, 2)
    assert model.config.norm_topk_prob and model.config.tie_word_embeddings
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (POLICY, MOE_POLICY)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    experts = model.model.layers[0].mlp.experts.down_proj.float()
    assert (experts[0] - experts[1]).norm() / experts[0].norm() > 0.2, "the experts were moved apart"


@torch.inference_mode()
def test_it_solves_problems_as_well_as_the_dense_policy_and_uses_its_experts() -> None:
    """By the log-likelihood of right solutions of 96 fresh problems: as telling as thousands of samples."""
    tokenizer = AutoTokenizer.from_pretrained(MOE_POLICY)
    problems = generate(96, seed=31, split="test")
    losses, shares = {}, None
    for folder in (POLICY, MOE_POLICY):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        total = count = 0
        for problem in problems:
            messages = [{"role": "user", "content": problem.question}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            ids = torch.tensor([prompt + tokenizer(problem.answer).input_ids])
            wanted = {"output_router_logits": True} if folder == MOE_POLICY else {}
            output = model(input_ids=ids, use_cache=False, **wanted)
            answer = slice(len(prompt) - 1, -1)
            total += float(cross_entropy(output.logits[0, answer], ids[0, len(prompt) :], reduction="sum"))
            count += ids.shape[1] - len(prompt)
            if wanted:
                chosen = torch.stack([logits.topk(2).indices.flatten() for logits in output.router_logits])
                found = torch.stack([row.bincount(minlength=8) for row in chosen])
                shares = found if shares is None else shares + found
        losses[folder] = total / count
    assert losses[MOE_POLICY] < 1.1 * losses[POLICY]
    assert (shares / shares.sum(-1, keepdim=True)).min() > 0.02, "no expert of a layer is left out"
