"""Make the mixture-of-experts policy of the quickstart from the dense one: exact upcycling, then a short training.

The upcycled model computes what the dense policy does (asserted below). Its experts, all alike then, are moved apart by
noise on their weights, and learn on the dense policy's own kind of problems, none of which it has seen. Same seed,
threads and torch: same policy. Takes about 5 minutes on one thread of a recent CPU.

Negative result: a policy made this way is hard to hurt. Its experts in 3 bits, whatever the quantizer, leave accuracy
where it is; losses show at 2 bits, and before that in log-likelihood.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from make_policy import evaluate, how_made, save_policy, train, training_batches
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from rl_accel.quickstart.deep import POLICY
from rl_accel.quickstart.problems import generate
from rl_accel.quickstart.tokenizer import build_tokenizer
from rl_accel.quickstart.upcycle import upcycle

EXPERTS, EXPERTS_PER_TOKEN, SHARED = 8, 2, 128
MAX_LOGIT_DIFFERENCE = 1e-4
"""Of the upcycled model and the dense policy, in float32: rounding."""
DATA_SEED_OFFSET = 100
"""Keeps the problems apart from those that the dense policy was trained on."""


def check_start(moe, dense) -> float:
    """Return the largest difference of logits on random tokens; AssertionError if it is more than rounding."""
    ids_BT = torch.randint(0, dense.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        difference = float((moe(ids_BT).logits - dense(ids_BT).logits).abs().max())
    assert difference <= MAX_LOGIT_DIFFERENCE, f"upcycling moved a logit by {difference:.3g}"
    return difference


def move_apart(moe, noise: float) -> None:
    """Multiply every weight of the routed experts by 1 + noise * N(0, 1)."""
    with torch.no_grad():
        for name, parameter in moe.named_parameters():
            if ".experts." in name:
                parameter.mul_(1 + noise * torch.randn_like(parameter))


def readme(args: argparse.Namespace, saved, difference: float, training: dict[str, float], evaluation: dict) -> str:
    """The policy folder's README."""
    routed, shared = saved.config.moe_intermediate_size, saved.config.shared_expert_intermediate_size
    return f"""# Mixture-of-experts quickstart policy

A Qwen2-MoE with {saved.num_parameters():,} parameters (bfloat16): {EXPERTS} experts of {routed} neurons, of which
a token takes {EXPERTS_PER_TOKEN}, and a shared expert of {shared}. Upcycled from the dense policy in `../policy`
without changing a logit by more than {difference:.1g}; then its experts were moved apart by noise on their weights and
trained on problems of the same kind, hurried solutions among them, so that there is as much to unlearn as in the dense
one. Nothing in it was downloaded.

{how_made("make_moe_policy.py", vars(args), training, evaluation)}"""


def parse_args() -> argparse.Namespace:
    """Command line; the defaults make the policy in the package."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of routers, noise and problems")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens in a batch, padding included")
    parser.add_argument("--lr", type=float, default=7e-4, help="highest learning rate")
    parser.add_argument("--aux", type=float, default=0.01, help="weight of the load-balancing loss")
    parser.add_argument("--noise", type=float, default=0.3, help="relative noise that moves experts apart")
    parser.add_argument("--router-std", type=float, default=0.3, help="standard deviation of the routers at the start")
    parser.add_argument("--hurried-share", type=float, default=0.6, help="share of hurried solutions")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--problems", type=int, default=768, help="test problems to evaluate on")
    parser.add_argument("--samples", type=int, default=1, help="samples of each at temperature 1")
    parser.add_argument("--out", type=Path, default=Path("rl_accel/quickstart/moe_policy"), help="folder to write")
    return parser.parse_args()


def main() -> None:
    """Upcycle, check, train, save, reload, evaluate, describe."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    set_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    tokenizer = build_tokenizer()
    dense = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32).eval()
    moe = upcycle(dense, EXPERTS, EXPERTS_PER_TOKEN, SHARED, args.router_std).eval()
    difference = check_start(moe, dense)
    move_apart(moe, args.noise)
    seed = args.seed + DATA_SEED_OFFSET
    batches = training_batches(tokenizer, args.steps, args.batch_tokens, args.hurried_share, seed)
    training = train(moe, batches, args.steps, args.lr, warm_up=50, aux=args.aux)
    save_policy(moe, tokenizer, args.out)
    saved = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    problems = generate(args.problems, seed=args.seed, split="test")
    evaluation = evaluate(saved, AutoTokenizer.from_pretrained(args.out), problems, args.samples, args.seed)
    print(json.dumps(evaluation, indent=2))
    (args.out / "README.md").write_text(readme(args, saved, difference, training, evaluation))


if __name__ == "__main__":
    main()
