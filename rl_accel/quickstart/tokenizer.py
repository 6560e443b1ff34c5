"""The quickstart policy's tokenizer: whole words and whole numbers, bytes for everything else.

It must be a `Qwen2Tokenizer`: transformers 5 makes one for every model of type qwen2, whatever tokenizer.json says, and
splits text by Qwen's rule, which takes numbers apart digit by digit. Words and numbers of the templates are therefore
*added tokens*, which are matched (leftmost, longest) before that rule applies. All else falls back to the 256 bytes, so
that any text survives a round trip. verl's Qwen builder wants a one-token newline and a token ``<|im_end|>``: ours ends
a turn.
"""

from __future__ import annotations

import re
from pathlib import Path

from tokenizers import AddedToken, pre_tokenizers
from transformers import Qwen2Tokenizer

from rl_accel.quickstart.problems import MAX_VALUE, generate

EOS_TOKEN = "<|im_end|>"
PAD_TOKEN = "<|endoftext|>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")

_PIECE = r" ?[A-Za-z]{2,}|=<<|>>|\.\n|#### "
"""Pieces of the templates that become tokens of their own, beside the numbers."""

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_NUM_SAMPLED_PROBLEMS = 4000  # enough that every word of every template occurs hundreds of times


def _template_pieces() -> list[str]:
    pieces: set[str] = set()
    for problem in generate(_NUM_SAMPLED_PROBLEMS, seed=0):
        pieces.update(re.findall(_PIECE, problem.question), re.findall(_PIECE, problem.answer))
    return sorted(pieces)


def build_tokenizer() -> Qwen2Tokenizer:
    """Build the tokenizer; its ids depend only on the templates in `problems`.

    Ids: 0 to 255 the bytes, then the special tokens, the numbers 10 to `MAX_VALUE`, the templates' words.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={character: index for index, character in enumerate(alphabet)},
        merges=[],
        unk_token=None,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        additional_special_tokens=list(ROLE_TOKENS),
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        padding_side="left",
    )
    words = [str(number) for number in range(10, MAX_VALUE + 1)] + _template_pieces()
    tokenizer.add_tokens([AddedToken(word, normalized=False, special=False) for word in words])
    return tokenizer


def save_tokenizer(tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    tokenizer.save_pretrained(folder, save_jinja_files=False)
