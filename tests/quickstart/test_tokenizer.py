"""The quickstart tokenizer: lossless, small, whole numbers, loadable beside a Qwen2 configuration."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, Qwen2Config

from rl_accel.quickstart.problems import MAX_VALUE, generate
from rl_accel.quickstart.tokenizer import build_tokenizer, save_tokenizer

TOKENIZER = build_tokenizer()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The saved tokenizer; the model type in config.json decides which class transformers makes of it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(TOKENIZER, folder)
    Qwen2Config(vocab_size=len(TOKENIZER)).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_problems_survive_a_round_trip(loaded):
    for problem in generate(2000, seed=11, split="test"):
        for text in (problem.question, problem.answer):
            assert loaded.decode(loaded(text).input_ids) == text


@given(st.text(alphabet=string.printable, max_size=60))
def test_printable_text_survives_a_round_trip(text):
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == text


@pytest.mark.parametrize("text", ["é漢🙂", "123 007 99100", "  two  spaces \n\n", "<|user|>Ana<|im_end|>"])
def test_other_text_survives_a_round_trip(loaded, text):
    assert loaded.decode(loaded(text).input_ids) == text


@pytest.mark.parametrize("template", ["{}", "She has {} apples.", "{}+{}=<<{}+{}={}>>{}", "#### {}"])
def test_a_number_is_one_and_the_same_token_everywhere(loaded, template):
    for number in range(MAX_VALUE + 1):
        token_id = loaded.convert_tokens_to_ids(str(number))
        token_ids = loaded(template.replace("{}", str(number))).input_ids
        assert token_ids.count(token_id) == template.count("{}")


def test_words_of_the_templates_are_whole_tokens(loaded):
    for problem in generate(500, seed=12):
        pieces = loaded.convert_ids_to_tokens(loaded(f"{problem.question}{problem.answer}").input_ids)
        assert all(len(piece) > 1 or piece == "A" for piece in pieces if piece.isalpha() and piece != "Ġ")


def test_saved_tokenizer_equals_the_built_one(loaded):
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert len(loaded) < 450
    assert loaded.bos_token is None
    assert loaded.eos_token == "<|im_end|>"
    assert loaded.pad_token_id not in (None, loaded.eos_token_id)
    for problem in generate(200, seed=13):
        assert loaded(problem.question).input_ids == TOKENIZER(problem.question).input_ids


def test_chat_template(loaded):
    messages = [{"role": "user", "content": "Ana has 12 pens."}]
    prompt = loaded.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|user|>Ana has 12 pens.<|assistant|>"
    assert loaded.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == loaded(prompt).input_ids
    finished = [*messages, {"role": "assistant", "content": "#### 12"}]
    assert loaded.apply_chat_template(finished, tokenize=False).endswith("<|assistant|>#### 12<|im_end|>")
