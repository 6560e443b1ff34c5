"""What 4-bit communication (SDP4Bit) costs in training loss: arms that start alike and read the same text.

    python scripts/bench_comm_loss.py [--seeds 8] [--steps 300,800] [--ranks 4] [--local 2] [--json FILE] [--plot FILE]

TinyGPT on text of a Markov chain, weights held in bfloat16, DeepSpeed ZeRO-2, AdamW with a cosine schedule, gradients
clipped to norm 1, gloo on this machine. A seed sets the first weights and the text; all arms of a seed run before the
next seed starts. Reported: the relative gap in validation loss to `unquantized` of the same seed, in percent, mean and
range over seeds, at the end of runs of every length and at step 25 of them (the schedule is that of the whole run).
`bf16` rounds as `unquantized` does and only adds in another order: its gaps are what chance makes.

    unquantized       nothing attached
    bf16              our collectives with 16 bits
    sdp4bit, paper    the defaults; the paper's groups of 2048 weights and stochastic rounding of gradients
    weights_only, gradients_only
    gradients_stochastic, gradients_8bit   gradients only: rounded at random; 8 bits on both hops
    group_64, group_32   the defaults with smaller groups of gradients: 4.5 and 5 bits instead of 4.25
    inter_8bit        the defaults with 8 bits on both hops of the gradients
    8bit_first        the same for the first 100 steps, then the defaults
  and controls, which lack what the method is made of and must be worse:
    naive_weights     4 bits of the weights themselves, groups of 2048, instead of their difference
    no_hadamard_4bit  gradients in 4 bits on both hops, groups of 2048, without rotation
    no_hadamard       the defaults without rotation

The loss is that of the held weights in float32 arithmetic, on 512 sequences kept apart. Replicas must be equal bit for
bit on all ranks at the end of every run, or the benchmark stops. Runs the operation's tests first.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import comm_ranks

from rl_accel import machine, processes
from rl_accel.hosts import versions

ARMS: dict[str, dict[str, Any] | None] = {
    "unquantized": None,
    "bf16": {"weight_bits": 16, "intra_bits": 16, "inter_bits": 16, "hadamard": False},
    "sdp4bit": {},
    "paper": {"weight_group_size": 2048, "gradient_rounding": "stochastic"},
    "weights_only": {"gradients": False},
    "gradients_only": {"weights": False},
    "gradients_stochastic": {"weights": False, "gradient_rounding": "stochastic"},
    "gradients_8bit": {"weights": False, "inter_bits": 8},
    "group_64": {"gradient_group_size": 64},
    "group_32": {"gradient_group_size": 32},
    "inter_8bit": {"inter_bits": 8},
    "8bit_first": {"inter_bits": 8, "then": {"inter_bits": 4}},
    "naive_weights": {"weight_difference": False, "weight_group_size": 2048, "gradients": False},
    "no_hadamard_4bit": {"intra_bits": 4, "hadamard": False, "gradient_group_size": 2048, "weights": False},
    "no_hadamard": {"hadamard": False},
}
"""Arm -> fields of SDP4BitConfig, and under `then` those that change after `SWITCH` steps; None: nothing attached."""
SWITCH = 100
EARLY = 25
"""A step at which validation loss is taken too: the loss still falls steeply there."""
CONTROLS = ("naive_weights", "no_hadamard_4bit", "no_hadamard")
WIDTH, LAYERS, LENGTH = 64, 2, 32
ALPHABET = 32
"""Tokens that the text uses: few enough contexts that the loss is on its last slope when a run ends."""
BATCH_SIZE = 8
"""Sequences a step and rank."""
WARM_UP = 20
NUM_VALIDATION, VALIDATION_SEED = 512, 999_999_999
SMOOTHED = 15
"""Steps that a point of the plot averages."""


class Rank:
    """The handlers of a rank."""

    def __init__(self) -> None:
        import torch
        from deepspeed.utils import logger

        from rl_accel.hosts.deepspeed import load

        torch.set_num_threads(1)
        logger.setLevel("ERROR")
        load("cpu").init_distributed(dist_backend="gloo", verbose=False)

    def train(self, settings: dict[str, Any] | None, seed: int, steps: int, learning_rate: float) -> dict[str, Any]:
        """One run; returns `losses` of this rank by step, `validation` loss at the end and `early`, after step `EARLY`,
        and `digest` of the weights held."""
        import deepspeed
        import torch
        import torch.distributed as dist

        from rl_accel.comm import SDP4BitConfig, attach
        from rl_accel.quickstart.tiny_gpt import MarkovText, TinyGPT, loss_of

        torch.manual_seed(seed)
        model = TinyGPT(WIDTH, LAYERS, length=LENGTH)
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
        config = {
            "train_micro_batch_size_per_gpu": BATCH_SIZE,
            "bf16": {"enabled": True},
            "gradient_clipping": 1.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 2, "overlap_comm": False},
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        changes = {} if settings is None else settings.pop("then", {})
        handle = None if settings is None else attach(engine, SDP4BitConfig(**settings, seed=seed))
        rank, world_size = dist.get_rank(), dist.get_world_size()
        text = MarkovText(LENGTH)
        text.followers %= ALPHABET
        share = text.batch(NUM_VALIDATION, VALIDATION_SEED).chunk(world_size)[rank]

        def validation_loss() -> float:
            held = copy.deepcopy(engine.module).float().eval()
            with torch.no_grad():
                loss = loss_of(held, share) * len(share) / NUM_VALIDATION
            dist.all_reduce(loss)
            return loss.item()

        losses, early = [], math.nan
        for step in range(steps):
            if changes and step == SWITCH:
                handle.detach()
                handle = attach(engine, SDP4BitConfig(**{**settings, **changes}, seed=seed))
            rate = learning_rate * min(1.0, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            for group in engine.optimizer.param_groups:
                group["lr"] = rate
            loss = loss_of(engine, text.batch(BATCH_SIZE, (seed * steps + step) * world_size + rank))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
            if step + 1 == EARLY:
                early = validation_loss()
        if handle is not None:
            handle.detach()
        validation = validation_loss()
        digest = hashlib.sha256()
        for weights in engine.module.parameters():
            digest.update(weights.detach().view(torch.uint8).numpy().data)
        return {"losses": losses, "validation": validation, "early": early, "digest": digest.hexdigest()}


def measure(options: argparse.Namespace) -> dict[int, dict[str, list[dict[str, Any]]]]:
    """Return steps of a run -> arm -> a run by seed: `losses` (mean of the ranks), `validation`, `early` and their gaps
    in percent, `gap` and `early_gap`."""
    found: dict[int, dict[str, list[dict[str, Any]]]] = {n: {name: [] for name in options.arms} for n in options.steps}
    with comm_ranks.Ranks([str(Path(__file__).resolve()), "--rank"], 1, options.ranks) as ranks:
        for steps, seed, name in itertools.product(options.steps, range(options.seeds), options.arms):
            settings = ARMS[name]
            if settings is not None:
                shared = {"bypass": "never", "local_size": options.local, "backend": options.backend}
                settings = {**shared, **settings}
            answers = ranks.order(do="train", settings=settings, seed=seed, steps=steps, learning_rate=options.lr)
            if len({answer["digest"] for answer in answers}) > 1:
                raise comm_ranks.RankError(f"{name}, seed {seed}: the ranks hold different weights")
            losses = [statistics.mean(step) for step in zip(*(a["losses"] for a in answers), strict=True)]
            run = {"losses": losses, "validation": answers[0]["validation"], "early": answers[0]["early"]}
            found[steps][name].append(run)
            base = found[steps]["unquantized"][seed]
            run["gap"] = 100 * (run["validation"] / base["validation"] - 1)
            run["early_gap"] = 100 * (run["early"] / base["early"] - 1)
            print(
                f"{steps} steps  seed {seed}  {name:<17} last {statistics.mean(losses[-10:]):.4f}  "
                f"validation {run['validation']:.4f}  gap {run['gap']:+.3f} %  at step {EARLY} "
                f"{run['early_gap']:+.3f} %  replicas equal",
                flush=True,
            )
            if options.json and name == options.arms[-1]:
                options.json.write_text(json.dumps(rows_of(found), indent=1) + "\n")  # what a run cut short leaves
    return found


def rows_of(found: dict[int, dict[str, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """Results by length of runs, step (the last one and `EARLY`) and arm, of the seeds that are complete."""
    rows = []
    for steps, by_arm in found.items():
        for what, gap, step in (("validation", "gap", steps), ("early", "early_gap", EARLY)):
            for name, runs in by_arm.items():
                if name == "unquantized" or not runs:
                    continue
                gaps = [run[gap] for run in runs]
                value = statistics.mean(run[what] for run in runs)
                incumbent = statistics.mean(run[what] for run in by_arm["unquantized"][: len(runs)])
                rows.append(
                    {
                        "name": f"comm.loss_gap.{name}.{steps}" + ("" if step == steps else f".step{step}"),
                        "value": statistics.mean(gaps),
                        "unit": "% of the validation loss unquantized",
                        "incumbent": 0.0,
                        "ratio": incumbent / value,
                        "bound": 0.0,
                        "gaps": gaps,
                        "standard_error": statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None,
                        "loss": value,
                        "loss_unquantized": incumbent,
                    }
                )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print("\ngap to unquantized, %: arm.steps of the run (.step looked at)")
    for row in rows:
        name = row["name"].removeprefix("comm.loss_gap.")
        error = "" if row["standard_error"] is None else f"  standard error {row['standard_error']:.3f}"
        control = "  (control)" if name.split(".")[0] in CONTROLS else ""
        span = f"({min(row['gaps']):+.3f} to {max(row['gaps']):+.3f}, {len(row['gaps'])} seeds)"
        print(f"{name:<28} {row['value']:+8.3f}  {span}{error}{control}")


def plot(found: dict[str, list[dict[str, Any]]], path: str) -> None:
    """Draw training loss, and its relative gap to unquantized, mean of the seeds, over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    def smooth(losses: np.ndarray) -> np.ndarray:
        return np.convolve(losses, np.ones(SMOOTHED) / SMOOTHED, mode="valid")

    curves = {name: smooth(np.mean([run["losses"] for run in runs], axis=0)) for name, runs in found.items()}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for name, curve in curves.items():
        style = "k-" if name == "unquantized" else "--" if name in CONTROLS else "-"
        left.plot(curve, style, label=name, linewidth=1.2)
        (line,) = right.plot(100 * (curve / curves["unquantized"] - 1), style, linewidth=1.2)
        line.set_color(left.lines[-1].get_color())
    left.set(xlabel="step", ylabel="training loss, nats a token")
    right.set(xlabel="step", ylabel="gap to unquantized, %", yscale="symlog")
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def read_options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", default="300", help="lengths of runs, with commas")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--local", type=int, default=2, help="ranks that count as one node")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--arms", default=",".join(ARMS), help="which to run; unquantized must be the first")
    parser.add_argument("--backend", default="auto", help="of the codec: auto, torch or cpp")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--json", type=Path, help="write the results as a list of {name, value, unit, ...}")
    parser.add_argument("--plot", help="draw the curves of the longest runs")
    options = parser.parse_args(argv)
    options.steps = sorted({int(steps) for steps in options.steps.split(",")})
    options.arms = options.arms.split(",")
    if options.arms[0] != "unquantized" or not set(options.arms) <= set(ARMS):
        parser.error(f"--arms starts with unquantized; known are {', '.join(ARMS)}")
    if options.seeds < 1 or options.steps[0] <= EARLY or options.ranks % options.local:
        parser.error(f"--seeds at least 1, --steps above {EARLY}, --local a divisor of --ranks")
    return options


def main(argv: list[str]) -> int:
    options = read_options(argv)
    comm_ranks.end_in_order()
    processes.start_reaper(processes.mark_children())
    print(f"{Path(sys.argv[0]).name} {' '.join(argv)}\n{machine.describe()}\n{versions.report()}", flush=True)
    if not options.skip_tests:
        root = Path(__file__).resolve().parent.parent
        subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/comm"], cwd=root, check=True)
    try:
        found = measure(options)
    except comm_ranks.RankError as error:
        print(f"bench_comm_loss: {error}", file=sys.stderr)
        return 1
    rows = rows_of(found)
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.plot:
        plot(found[options.steps[-1]], options.plot)
    return 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--rank"]:
        comm_ranks.serve(Rank)
    else:
        sys.exit(main(sys.argv[1:]))
