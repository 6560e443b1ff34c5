"""Train, evaluate and save the quickstart policy: a Qwen2 of about one million parameters, on a CPU.

Supervised learning on generated problems, loss on the answer only. A share of the solutions to learn from was
written in a hurry, so that reinforcement learning has one habit to unlearn that all solutions share, beside
the sums, each a small fact of its own. Same seed, threads and torch: same policy.

Negative results: trained without hurried solutions (accuracy 0.3 at temperature 1, only unsure sums), 60 to 80 steps of
GRPO with 16 x 8 samples gained nothing at learning rates 3e-5 and 1e-4 and lost two thirds at 3e-4. With them,
1e-4 went from 0.31 to 0.36 in 50 steps (200 problems, two samples each); 3e-4 halved accuracy again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import random
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from rl_accel.quickstart.problems import MAX_VALUE, Problem, generate
from rl_accel.quickstart.tokenizer import build_tokenizer, save_tokenizer

# Shapes: B sequences in a batch, T tokens, V vocabulary.

MAX_RESPONSE_LENGTH = 320
_CALCULATION = re.compile(r"(\d+)([-+*])(\d+)=<<.*>>\d+")
_SLIP_RATE = 0.6  # above one half, so that greedy decoding does not see through a hurried solution
IGNORED = -100  # label that cross_entropy leaves out


def prompt_token_ids(tokenizer, question: str) -> list[int]:
    """Token ids of the question in the chat template, up to where the answer begins."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def hurried_answer(answer: str, rng: random.Random) -> str:
    """A solution as a pupil in a hurry writes it: sums without words, many results one too large.

    Later steps go on from the wrong value. The right solution is returned where that would leave 0..MAX_VALUE.
    """
    *lines, _ = answer.split("\n")
    value = int(_CALCULATION.search(lines[0]).group(1))
    written = []
    for line in lines:
        operation, operand = _CALCULATION.search(line).group(2, 3)
        expression = f"{value}{operation}{operand}"
        value = {"+": value + int(operand), "-": value - int(operand), "*": value * int(operand)}[operation]
        value += rng.random() < _SLIP_RATE
        if not 0 <= value <= MAX_VALUE:
            return answer
        written.append(f"{expression}=<<{expression}={value}>>{value}")
    return "\n".join([*written, f"#### {value}"])


def training_batches(
    tokenizer, num_steps: int, batch_tokens: int, hurried_share: float, seed: int
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield `num_steps` batches (token ids, labels), both [B, T], right-padded, of similar lengths.

    Every problem is new. A pool of problems is sorted by length and cut at `batch_tokens`, padding included.
    """
    rng = random.Random(seed)
    num_batches = 0
    for pool in range(num_steps):
        examples = []
        for problem in generate(4096, seed=seed * 1000 + pool + 1):
            text = problem.answer if rng.random() >= hurried_share else hurried_answer(problem.answer, rng)
            prompt = prompt_token_ids(tokenizer, problem.question)
            answer = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
            examples.append((prompt + answer, [IGNORED] * len(prompt) + answer))
        examples.sort(key=lambda example: len(example[0]))
        batches: list[list] = [[]]
        for example in examples:
            if (len(batches[-1]) + 1) * len(example[0]) > batch_tokens:
                batches.append([])
            batches[-1].append(example)
        rng.shuffle(batches)
        for batch in batches:
            longest = max(len(ids) for ids, _ in batch)
            yield (
                torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in batch]),
                torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in batch]),
            )
            num_batches += 1
            if num_batches == num_steps:
                return


def build_model(tokenizer) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights; float32."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def answer_loss(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, in nats a token of the answers.

    Right padding needs no mask: attention is causal and padded labels are left out.
    """
    return cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORED)


def train(
    model, batches: Iterable[tuple[torch.Tensor, ...]], steps: int, lr: float, warm_up: int = 100, aux: float = 0.0
) -> dict[str, float]:
    """AdamW, warm-up, cosine decay; returns seconds, tokens (padding included) and the last mean loss.

    Args:
        batches: as from `training_batches`.
        lr: the highest learning rate, reached after `warm_up` steps.
        aux: weight of the load-balancing loss of a mixture of experts, which the loss that is returned leaves out.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    start, num_tokens, losses = time.perf_counter(), 0, []
    model.train()
    for step, (ids_BT, labels_BT) in enumerate(batches):
        output = model(input_ids=ids_BT, use_cache=False, **({"output_router_logits": True} if aux else {}))
        loss = answer_loss(output.logits, labels_BT)
        (loss + aux * output.aux_loss if aux else loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        num_tokens += ids_BT.numel()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - start
            loss_and_speed = f"loss {sum(losses[-100:]) / 100:.4f} {num_tokens / seconds:.0f} tokens/s"
            print(f"step {step + 1}/{steps} {seconds:.0f} s {loss_and_speed}", flush=True)
    last = losses[-100:]
    return {"seconds": time.perf_counter() - start, "tokens": num_tokens, "loss": sum(last) / len(last)}


@torch.inference_mode()
def sample(
    model, tokenizer, questions: list[str], temperature: float, seed: int
) -> tuple[list[list[int]], list[float]]:
    """Sample one response to each question, at most MAX_RESPONSE_LENGTH tokens; temperature 0 is greedy.

    Returns:
        token ids of each response, its end token included if it was reached, and the entropy (nats) of the
        policy at temperature 1 before each of these tokens, all responses in one list.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = [prompt_token_ids(tokenizer, question) for question in questions]
    longest = max(map(len, prompts))
    ids_BT = torch.tensor([[tokenizer.pad_token_id] * (longest - len(ids)) + ids for ids in prompts])
    mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    responses: list[list[int]] = [[] for _ in prompts]
    entropies: list[float] = []
    running = list(range(len(prompts)))
    cache = None
    for _ in range(MAX_RESPONSE_LENGTH):
        output = model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        log_probs_BV = output.logits[:, -1].log_softmax(-1)
        entropy_B = -(log_probs_BV.exp() * log_probs_BV).sum(-1)
        if temperature == 0:
            next_B = log_probs_BV.argmax(-1)
        else:
            next_B = torch.multinomial((log_probs_BV / temperature).softmax(-1), 1, generator=generator)[:, 0]
        for row, response_index in enumerate(running):
            responses[response_index].append(int(next_B[row]))
            entropies.append(float(entropy_B[row]))
        alive_B = next_B != tokenizer.eos_token_id
        if not alive_B.any():
            break
        running = [response_index for response_index, alive in zip(running, alive_B.tolist(), strict=True) if alive]
        keep = alive_B.nonzero()[:, 0]
        cache.batch_select_indices(keep)
        ids_BT = next_B[keep, None]
        mask_BT = torch.cat([mask_BT[keep], mask_BT.new_ones(len(keep), 1)], dim=1)
        positions_BT = positions_BT[keep, -1:] + 1
    return responses, entropies


def final_number(answer: str) -> str | None:
    """What stands after the last ``#### ``, or None."""
    return answer.rpartition("#### ")[2].strip() if "#### " in answer else None


def evaluate(model, tokenizer, problems: list[Problem], num_samples: int, seed: int) -> dict:
    """Accuracy at temperature 0 and 1, pass@num_samples, entropy, lengths, malformed and cut responses."""
    greedy_hits, hits, lengths, entropies, num_cut, num_malformed = [], [], [], [], 0, 0
    for first in range(0, len(problems), 64):
        chunk = problems[first : first + 64]
        targets = [final_number(problem.answer) for problem in chunk]
        questions = [problem.question for problem in chunk]
        responses, _ = sample(model, tokenizer, questions, 0.0, seed)
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        greedy_hits += [final_number(text) == target for text, target in zip(texts, targets, strict=True)]
        repeated = [question for question in questions for _ in range(num_samples)]
        responses, chunk_entropies = sample(model, tokenizer, repeated, 1.0, seed + 1 + first)
        entropies += chunk_entropies
        lengths += map(len, responses)
        num_cut += sum(ids[-1] != tokenizer.eos_token_id for ids in responses)
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        num_malformed += sum(not (final_number(text) or "").isdecimal() for text in texts)
        for index, target in enumerate(targets):
            samples = texts[index * num_samples : (index + 1) * num_samples]
            hits.append([final_number(text) == target for text in samples])
    by_num_steps = {}
    for num_steps in sorted({problem.num_steps for problem in problems}):
        chosen = [
            sum(row) / num_samples
            for row, problem in zip(hits, problems, strict=True)
            if problem.num_steps == num_steps
        ]
        by_num_steps[num_steps] = [round(sum(chosen) / len(chosen), 3), len(chosen)]
    lengths.sort()
    count = len(problems)
    return {
        "num_problems": count,
        "accuracy_greedy": sum(greedy_hits) / count,
        "accuracy_t1": sum(map(sum, hits)) / count / num_samples,
        f"pass@{num_samples}_t1": sum(map(any, hits)) / count,
        "mixed_groups_t1": sum(any(row) and not all(row) for row in hits) / count,
        "entropy_t1": sum(entropies) / len(entropies),
        "response_length_median": lengths[len(lengths) // 2],
        "response_length_p99": lengths[len(lengths) * 99 // 100],
        "response_length_max": lengths[-1],
        "share_cut": num_cut / len(lengths),
        "share_malformed": num_malformed / len(lengths),
        "accuracy_t1_by_num_steps": by_num_steps,
    }


def save_policy(model, tokenizer, folder: Path) -> None:
    """Write weights (bfloat16), configuration and tokenizer."""
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def how_made(script: str, options: dict, training: dict[str, float], evaluation: dict) -> str:
    """The part of a policy's README that says how it was made and how well it does."""
    words = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items() if name != "out")
    machine = f"{platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}"
    speed = training["tokens"] / training["seconds"]
    return f"""Made on {datetime.date.today()} by

    python scripts/{script} {words}

in {training["seconds"]:.0f} s on {options["threads"]} thread(s) ({machine}):
{training["tokens"]:,} tokens with padding, {speed:,.0f} tokens/s, last mean loss {training["loss"]:.4f}.

Evaluation on {evaluation["num_problems"]} problems of the test split, the saved weights loaded as float32;
t1: sampled at temperature 1; entropy in nats per token; lengths in tokens; by number of reasoning steps:
[accuracy, problems].

```json
{json.dumps(evaluation, indent=2)}
```
"""


def readme(args: argparse.Namespace, num_parameters: int, training: dict[str, float], evaluation: dict) -> str:
    """The policy folder's README."""
    return f"""# Quickstart policy

A Qwen2 with {num_parameters:,} parameters (bfloat16) that solves the word problems of
`rl_accel.quickstart.problems`, on purpose not very well. {args.hurried_share:.0%} of the solutions it was trained
on were written in a hurry: sums without words, {_SLIP_RATE:.0%} of the results one too large. The others are right.
The hurry is there to be unlearned by reinforcement learning. Nothing in it was downloaded.

{how_made("make_policy.py", vars(args), training, evaluation)}"""


def parse_args() -> argparse.Namespace:
    """Command line; the defaults make the policy in the package."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of weights, problems and slips")
    parser.add_argument("--steps", type=int, default=4500, help="optimizer steps")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens in a batch, padding included")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--hurried-share", type=float, default=0.6, help="share of hurried solutions")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--problems", type=int, default=400, help="test problems to evaluate on, 8 samples each")
    parser.add_argument("--out", type=Path, default=Path("rl_accel/quickstart/policy"), help="folder to write")
    return parser.parse_args()


def main() -> None:
    """Train, save, reload, evaluate, describe."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    batches = training_batches(tokenizer, args.steps, args.batch_tokens, args.hurried_share, args.seed)
    training = train(model, batches, args.steps, args.lr)
    save_policy(model, tokenizer, args.out)
    saved = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    test_problems = generate(args.problems, seed=args.seed, split="test")
    evaluation = evaluate(saved, AutoTokenizer.from_pretrained(args.out), test_problems, 8, args.seed)
    print(json.dumps(evaluation, indent=2))
    (args.out / "README.md").write_text(readme(args, saved.num_parameters(), training, evaluation))


if __name__ == "__main__":
    main()
