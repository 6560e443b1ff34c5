"""Distill a small draft model from a policy of the quickstart: Qwen2, two layers, the policy's tokenizer.

    python scripts/distill_draft.py POLICY OUT [--responses 3000] [--steps 2000]

The policy writes responses at temperature 1; the draft learns the policy's whole distribution before each of their
tokens (forward KL), and then, two batches of three, before those of reference answers to new problems, of which there
are as many as wanted: from 3,000 responses alone it learns them by heart (steps equal to the policy's: .59).
Same seed, threads and torch: same draft. Left out: learning from the draft's own texts.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from make_policy import IGNORED, final_number, prompt_token_ids, sample, save_policy, training_batches
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from rl_accel.lookahead.text import delimiter_ids
from rl_accel.progress import tqdm
from rl_accel.quickstart.problems import Problem, generate

# Shapes: B texts in a batch, T tokens, N response tokens of a batch, V vocabulary.

DATA_SEED = 30_000
"""Of the problems to learn on, apart from those that the policy is trained and validated on."""
FRESH_SEED = 77
"""Of the problems whose reference answers it learns on."""
AT_ONCE = 64
BATCH_TOKENS = 1536
Text = tuple[list[int], list[int]]
"""Token ids of a prompt and of the response to it."""


def build_draft(tokenizer, hidden: int = 96, layers: int = 2, heads: int = 3) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights, float32. The CPU build of vLLM has attention for head sizes 32, 64, 80, ... only."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def write(policy: PreTrainedModel, tokenizer, problems: Sequence[Problem], temperature: float, seed: int) -> list[Text]:
    """Let the policy respond to each problem once; texts in the order of the problems."""
    by_length = sorted(range(len(problems)), key=lambda index: problems[index].num_steps)
    texts: list[Text | None] = [None] * len(problems)
    for first in range(0, len(problems), AT_ONCE):
        chosen = by_length[first : first + AT_ONCE]
        questions = [problems[index].question for index in chosen]
        responses, _ = sample(policy, tokenizer, questions, temperature, seed + first)
        for index, question, response in zip(chosen, questions, responses, strict=True):
            texts[index] = (prompt_token_ids(tokenizer, question), response)
    return texts


def batches(texts: list[Text], num_steps: int, batch_tokens: int, pad: int, seed: int) -> Iterator[tuple]:
    """Yield `num_steps` batches (token ids, whether a token is of a response), both [B, T], right-padded, of similar
    lengths; all texts once an epoch. `batch_tokens` has the padding in it."""
    rng = random.Random(seed)
    rows: list[list[Text]] = [[]]
    for text in sorted(texts, key=lambda text: sum(map(len, text))):
        if (len(rows[-1]) + 1) * sum(map(len, text)) > batch_tokens:
            rows.append([])
        rows[-1].append(text)
    for step in range(num_steps):
        if step % len(rows) == 0:
            rng.shuffle(rows)
        row = rows[step % len(rows)]
        longest = max(len(prompt) + len(response) for prompt, response in row)
        ids = [[*prompt, *response] + [pad] * (longest - len(prompt) - len(response)) for prompt, response in row]
        spans = [(len(prompt), len(prompt) + len(response)) for prompt, response in row]
        yield torch.tensor(ids), torch.tensor([[a <= t < b for t in range(longest)] for a, b in spans])


def mixed(
    texts: list[Text], tokenizer, num_steps: int, batch_tokens: int, hurried_share: float = 0.3
) -> Iterator[tuple]:
    """Yield batches as `batches` does, of which two of three are reference answers to new problems."""
    own = batches(texts, num_steps, batch_tokens, tokenizer.pad_token_id, 1)
    fresh = training_batches(tokenizer, num_steps, batch_tokens, hurried_share, FRESH_SEED)
    for step in range(num_steps):
        if step % 3 == 0:
            yield next(own)
        else:
            ids, labels = next(fresh)
            yield ids, labels != IGNORED


def distill(draft: PreTrainedModel, policy: PreTrainedModel, examples: Iterator[tuple], steps: int, lr: float) -> float:
    """Fit the draft to the policy; returns the mean KL, in nats a token, of the last 50 steps.

    Args:
        examples: as from `batches`, `steps` of them.
        lr: the highest learning rate, reached after 20 steps; cosine decay.
    """
    optimizer = torch.optim.AdamW(draft.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    losses = []
    draft.train()
    for ids_BT, wanted_BT in tqdm(examples, desc="distilling", total=steps, unit="step"):
        chosen = wanted_BT[:, 1:]
        with torch.no_grad():
            target_NV = policy(input_ids=ids_BT, use_cache=False).logits[:, :-1][chosen].log_softmax(-1)
        found_NV = draft(input_ids=ids_BT, use_cache=False).logits[:, :-1][chosen].log_softmax(-1)
        loss = kl_div(found_NV, target_NV, reduction="batchmean", log_target=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    draft.eval()
    return sum(losses[-50:]) / len(losses[-50:])


def steps_of(response: list[int], delimiters: set[int]) -> list[list[int]]:
    """Cut a response behind each delimiter; the last step ends in the end token."""
    steps: list[list[int]] = [[]]
    for index, token in enumerate(response):
        steps[-1].append(token)
        if token in delimiters and index + 1 < len(response):
            steps.append([])
    return steps


@torch.inference_mode()
def agreement(draft: PreTrainedModel, tokenizer, greedy: list[Text]) -> dict[str, float]:
    """How often the draft at temperature 0 writes what the policy wrote at temperature 0, on the policy's own path.

    Returns:
        shares of tokens and of whole steps that are equal, each behind the policy's tokens.
    """
    delimiters = set(delimiter_ids(tokenizer, "\n"))
    tokens, steps = [], []
    for prompt, response in greedy:
        logits_TV = draft(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        same = (logits_TV.argmax(-1) == torch.tensor(response)).tolist()
        tokens += same
        for step in steps_of(response, delimiters):
            steps.append(all(same[: len(step)]))
            del same[: len(step)]
    return {"tokens_exact": sum(tokens) / len(tokens), "steps_exact": sum(steps) / len(steps)}


def accuracy(tokenizer, texts: list[Text], problems: Sequence[Problem]) -> float:
    """Share of the responses that end in the right number."""
    found = tokenizer.batch_decode([response for _, response in texts], skip_special_tokens=True)
    return sum(final_number(a) == final_number(b.answer) for a, b in zip(found, problems, strict=True)) / len(problems)


def evaluate(draft: PreTrainedModel, policy: PreTrainedModel, tokenizer, num_problems: int) -> dict[str, float]:
    """Accuracy of both and agreement, all at temperature 0, on problems of the test split."""
    problems = generate(num_problems, seed=DATA_SEED, split="test")
    theirs, ours = (write(model, tokenizer, problems, 0.0, 0) for model in (policy, draft))
    return {
        "policy_accuracy": accuracy(tokenizer, theirs, problems),
        "draft_accuracy": accuracy(tokenizer, ours, problems),
        **agreement(draft, tokenizer, theirs),
    }


def make_draft(
    policy_folder: Path, out: Path, responses: int = 3000, steps: int = 2000, seed: int = 0, problems: int = 240
) -> dict[str, float]:
    """Write a draft for a policy and return how it does and how long its parts took, in seconds."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    policy = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32).eval()
    began = time.perf_counter()
    texts = write(policy, tokenizer, generate(responses, seed=DATA_SEED + seed), 1.0, seed)
    wrote = time.perf_counter()
    draft = build_draft(tokenizer)
    examples = batches(texts, steps, BATCH_TOKENS, tokenizer.pad_token_id, 0)
    distill(draft, policy, examples, steps, lr=4e-3)
    kl = distill(draft, policy, mixed(texts, tokenizer, steps, BATCH_TOKENS), steps, lr=3e-3)
    learned = time.perf_counter()
    save_policy(draft, tokenizer, out)
    saved = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    return {
        "parameters": saved.num_parameters(),
        "response_tokens": sum(len(response) for _, response in texts),
        "write_s": wrote - began,
        "distill_s": learned - wrote,
        "kl": kl,
        **evaluate(saved, policy, tokenizer, problems),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("policy", type=Path, help="folder of the policy")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--responses", type=int, default=3000, help="texts of the policy to learn from")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps of each phase")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, problems and samples")
    args = parser.parse_args()
    print(json.dumps(make_draft(args.policy, args.out, args.responses, args.steps, args.seed), indent=2))


if __name__ == "__main__":
    main()
