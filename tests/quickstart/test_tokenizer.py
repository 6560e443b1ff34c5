"""The quickstart tokenizer: lossless, small, atomic numbers, loadable without our code."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rl_accel.quickstart.problems import MAX_VALUE, generate
from rl_accel.quickstart.tokenizer import build_tokenizer, save_tokenizer

PRINTABLE = sorted(set(string.printable) - set("\t\r\x0b\x0c"))
TOKENIZER = build_tokenizer()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(TOKENIZER, folder)
    return AutoTokenizer.from_pretrained(folder)


def test_problems_survive_a_round_trip(loaded):
    for problem in generate(2000, seed=11, split="test"):
        for text in (problem.question, problem.answer):
            assert loaded.decode(loaded(text).input_ids) == text


@given(st.text(alphabet=PRINTABLE, max_size=60))
def test_printable_text_survives_a_round_trip(text):
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == text


def test_unknown_characters_become_unk_one_by_one():
    unk = TOKENIZER.unk_token_id
    assert TOKENIZER("é漢").input_ids == [unk, unk]


@pytest.mark.parametrize("template", ["{}", "She has {} apples.", "12+{}=<<12+{}=3>>{}", "#### {}"])
def test_a_number_is_one_token_everywhere(template):
    for number in range(MAX_VALUE + 1):
        token_id = TOKENIZER.convert_tokens_to_ids(str(number))
        text = template.replace("{}", str(number))
        assert TOKENIZER(text).input_ids.count(token_id) >= template.count("{}")


def test_words_of_the_templates_are_whole_tokens():
    """Only the lone full stops and operators of a problem are single characters."""
    for problem in generate(500, seed=12):
        pieces = TOKENIZER.convert_ids_to_tokens(TOKENIZER(f"{problem.question}{problem.answer}").input_ids)
        letters = [piece for piece in pieces if len(piece) == 1 and piece.isalpha() and piece != "A"]
        assert not letters


def test_saved_tokenizer_equals_the_built_one(loaded):
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert len(loaded) < 400
    assert loaded.bos_token is None
    assert loaded.eos_token == "<|endoftext|>"
    assert loaded.pad_token_id not in (None, loaded.eos_token_id)


def test_chat_template(loaded):
    messages = [{"role": "user", "content": "Ana has 12 pens."}]
    prompt = loaded.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|user|>Ana has 12 pens.<|assistant|>"
    assert (
        loaded.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        == loaded(prompt).input_ids
    )
    finished = [*messages, {"role": "assistant", "content": "#### 12"}]
    assert loaded.apply_chat_template(finished, tokenize=False).endswith("<|assistant|>#### 12<|endoftext|>")
