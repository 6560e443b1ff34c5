"""The policy in the package: its size, loading by plain transformers, and how well it solves problems."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rl_accel.quickstart
from rl_accel.quickstart.problems import generate

FOLDER = Path(rl_accel.quickstart.__file__).parent / "policy"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_size_and_architecture(model, tokenizer):
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 5_000_000
    assert 500_000 <= model.num_parameters() <= 5_000_000
    assert model.config.architectures == ["Qwen2ForCausalLM"]
    assert model.config.tie_word_embeddings
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_saved_tokenizer_knows_the_templates(tokenizer):
    """Fails if the templates changed after the policy was made: run scripts/make_policy.py again."""
    for problem in generate(300, seed=21, split="test"):
        token_ids = tokenizer(f"{problem.question}{problem.answer}").input_ids
        letters = [piece for piece in tokenizer.convert_ids_to_tokens(token_ids) if piece.isalpha() and piece != "Ġ"]
        assert all(len(piece) > 1 or piece == "A" for piece in letters)


@torch.inference_mode()
def test_policy_has_the_format_and_room_to_improve(model, tokenizer):
    """One response per problem at temperature 1: accuracy 0.2..0.6, with a standard error of 0.04."""
    problems = generate(150, seed=22, split="test")
    chats = [[{"role": "user", "content": problem.question}] for problem in problems]
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    torch.manual_seed(0)
    sequences = model.generate(**prompts, max_new_tokens=320, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    prompt_length = prompts["input_ids"].shape[1]
    responses = sequences[:, prompt_length:]  # [150, response length]
    is_finished = (responses == tokenizer.eos_token_id).any(1)
    assert is_finished.all()

    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    numbers = [text.rpartition("#### ")[2] if "#### " in text else "" for text in texts]
    assert sum(number.isdecimal() for number in numbers) >= 147
    targets = [problem.answer.rpartition("#### ")[2] for problem in problems]
    accuracy = sum(map(str.__eq__, numbers, targets)) / len(problems)
    assert 0.2 <= accuracy <= 0.6

    is_padding = sequences == tokenizer.pad_token_id
    mask = (~is_padding).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=sequences, attention_mask=mask, position_ids=positions).logits
    log_probs = logits[:, prompt_length - 1 : -1].log_softmax(-1)
    entropies = -(log_probs.exp() * log_probs).sum(-1)[mask[:, prompt_length:].bool()]
    assert entropies.mean() > 0.03
