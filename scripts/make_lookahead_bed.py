"""The test bed of lookahead decoding: a policy, an expensive target that writes the same, a draft, and problems.

    python scripts/make_lookahead_bed.py --out FOLDER [--layers 24] [--steps 64] [--fast]

    FOLDER/policy   the shipped policy after `--steps` steps of the default GRPO run (64), which is in FOLDER/run-*
    FOLDER/target   that policy with `--layers` layers of which the new ones change nothing: the same logits, checked
    FOLDER/draft    two layers distilled from the policy, 0.28 M parameters
    FOLDER/problems-{mix,long,chain}.jsonl    none of them trained on; see `write_problems`

Only what is not there yet, or was made with other settings, is made; `<part>.made.json` beside a part has its settings,
seconds and results. A run that is interrupted goes on where it was. `--fast` is a bed for
tests: no GRPO, few layers, a draft that has learned little.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from distill_draft import make_draft
from make_policy import prompt_token_ids, save_policy
from transformers import AutoModelForCausalLM, AutoTokenizer

from rl_accel.errors import RunFailedError
from rl_accel.quickstart.deep import POLICY, grow
from rl_accel.quickstart.problems import STEP_WEIGHTS, generate
from rl_accel.run_folder import write_whole

FORMAT = 1
"""Raised where beds of before have to be made anew."""
PROBLEM_SEED = 40_000
MIN_LONG_STEPS = 5
GSM8K_STEP_WEIGHTS = (0, 2, 9, 33, 43, 53, 79, 69, 76, 92, 67, 796)
"""GSM8K's 1,319 test answers by the steps of 16.4 tokens that their length in the policy's tokens makes, at most 12."""
STEP_WEIGHTS_OF = {
    "mix": STEP_WEIGHTS,
    "long": (0,) * (MIN_LONG_STEPS - 1) + STEP_WEIGHTS[MIN_LONG_STEPS - 1 :],
    "chain": GSM8K_STEP_WEIGHTS,
}
"""File of problems -> relative frequency of 1, 2, ... 12 steps."""
END_WAIT_S = 60.0
Made = dict[str, Any]
"""Settings, seconds and results of a part."""


@dataclass(frozen=True)
class BedSettings:
    """What a bed is made with."""

    layers: int = 24
    """Of the target; the policy has 4."""
    steps: int = 64
    """Of GRPO; 0: the shipped policy as it is."""
    responses: int = 3000
    """Of the policy, for the draft to learn from."""
    distill_steps: int = 2000
    """Of the draft's optimizer, in each of two phases."""
    problems: int = 640
    """In each file."""
    seed: int = 0
    """Of the GRPO run and of the draft."""


FAST = BedSettings(layers=6, steps=0, responses=256, distill_steps=80)


@dataclass(frozen=True)
class Bed:
    """Where the parts of a bed are."""

    folder: Path

    @property
    def policy(self) -> Path:
        return self.folder / "policy"

    @property
    def target(self) -> Path:
        return self.folder / "target"

    @property
    def draft(self) -> Path:
        return self.folder / "draft"

    def problems(self, name: str) -> Path:
        """Of `mix`, `long` or `chain`: problem_id, messages, prompt_token_ids, answer, num_steps, a line each."""
        return self.folder / f"problems-{name}.jsonl"

    def made(self, part: Path) -> Made:
        """What is known of a part: settings, seconds, results."""
        return json.loads(stamp_of(part).read_text())


def make_bed(folder: str | Path, settings: BedSettings = BedSettings()) -> Bed:
    """Make what is not there yet, and return where it is. Another process that makes a bed here is waited for.

    Raises:
        RunFailedError: if GRPO fails; the same call goes on from its last checkpoint.
    """
    bed = Bed(Path(folder).expanduser().resolve())
    bed.folder.mkdir(parents=True, exist_ok=True)
    shipped = hashlib.sha256((POLICY / "model.safetensors").read_bytes()).hexdigest()[:16]
    of_policy = {"format": FORMAT, "shipped": shipped, "steps": settings.steps, "seed": settings.seed}
    of_draft = of_policy | {"responses": settings.responses, "distill_steps": settings.distill_steps}
    with _locked(bed.folder / ".lock"):
        _make(bed.policy, of_policy, lambda out: make_policy(bed.folder, out, settings))
        _make(bed.target, of_policy | {"layers": settings.layers}, lambda out: make_target(bed.policy, out, settings))
        _make(
            bed.draft,
            of_draft,
            lambda out: make_draft(bed.policy, out, settings.responses, settings.distill_steps, settings.seed),
        )
        for number, (name, weights) in enumerate(STEP_WEIGHTS_OF.items()):
            of_problems = {"format": FORMAT, "problems": settings.problems, "seed": PROBLEM_SEED + number}
            _make(
                bed.problems(name),
                of_problems | {"step_weights": list(weights)},
                lambda out, of=of_problems, weights=weights: write_problems(out, of["problems"], of["seed"], weights),
            )
    return bed


def stamp_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.made.json")


def _make(part: Path, settings: dict[str, Any], make: Callable[[Path], Made]) -> None:
    """Let `make` write a file or folder unless it is there with these settings. The stamp is written last."""
    stamp, partial = stamp_of(part), part.with_name(f".{part.name}.partial")
    try:
        if part.exists() and json.loads(stamp.read_text())["settings"] == settings:
            return
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no stamp, or none of ours
    print(f"making {part}", flush=True)
    began = time.perf_counter()
    for old in (stamp, partial, part):
        _remove(old)
    results = make(partial)
    os.replace(partial, part)
    text = json.dumps({"settings": settings, "seconds": round(time.perf_counter() - began, 1), **results}, indent=1)
    write_whole(stamp, lambda path: path.write_text(text + "\n"))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make_policy(folder: Path, out: Path, settings: BedSettings) -> Made:
    """Write the policy after GRPO: the run's weights in bfloat16, as the shipped policy's are."""
    if settings.steps == 0:
        shutil.copytree(POLICY, out)
        return {}
    run = folder / f"run-steps{settings.steps}-seed{settings.seed}"
    weights = run / "checkpoints" / f"global_step_{settings.steps}" / "actor" / "huggingface"
    if not _is_finished(run):
        _train(run, settings)
    save_policy(AutoModelForCausalLM.from_pretrained(weights), AutoTokenizer.from_pretrained(POLICY), out)
    return {"run": run.name}


def _is_finished(run: Path) -> bool:
    try:
        return json.loads((run / "run.json").read_text()).get("finished", False)
    except (OSError, ValueError):
        return False


def _train(run: Path, settings: BedSettings) -> None:
    """The default run, less its validations, which training does not depend on."""
    contents = "[model,optimizer,extra]"
    command = [
        sys.executable, "-m", "rl_accel.train", "recipe=gsm8k_grpo/cpu", f"rl_accel.run_dir={run}",
        f"rl_accel.seed={settings.seed}", f"trainer.total_training_steps={settings.steps}", "trainer.logger=[file]",
        "trainer.test_freq=-1", "trainer.val_before_train=false",
        f"actor_rollout_ref.actor.checkpoint.save_contents={contents[:-1]},hf_model]",
        f"actor_rollout_ref.actor.checkpoint.load_contents={contents}",
    ]  # fmt: skip
    process = subprocess.Popen(command, env={**os.environ, "RL_ACCEL_DEVICE": "cpu"})
    try:
        status = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(END_WAIT_S)
    if status:
        raise RunFailedError(
            f"GRPO ended with status {status}, see above; the same command goes on from its checkpoint"
        )


def make_target(policy: Path, out: Path, settings: BedSettings) -> Made:
    """Write the policy with more layers.

    Raises:
        AssertionError: if a logit is not the policy's, to the bit.
    """
    grow(policy, out, settings.layers)
    ids_BT = torch.randint(0, 400, (4, 128), generator=torch.Generator().manual_seed(0))
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (policy, out)]
    with torch.inference_mode():
        before, after = (model(ids_BT, use_cache=False).logits for model in models)
    assert torch.equal(before, after), f"growing moved a logit by {(before - after).abs().max():.3g}"
    return {"parameters": models[1].num_parameters()}


def write_problems(out: Path, num_problems: int, seed: int, step_weights: tuple[float, ...]) -> Made:
    """Write problems of the test split, of which none is trained on.

    `mix` has the steps of the training problems, `long` those with five steps or more in the proportions of `mix`.
    `chain` is as long as the answers of GSM8K in the policy's tokens (mean 240, of whose words it knows few), as far as
    it goes: a policy that was trained on at most 12 steps (200 tokens) loses the thread behind them, and behind a first
    answer too, so that 56 % of the answers of GSM8K are longer than what any problem here asks for.
    """
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    problems = generate(num_problems, seed, "test", step_weights)
    rows = [
        {
            "problem_id": problem.problem_id,
            "messages": [{"role": "user", "content": problem.question}],
            "prompt_token_ids": prompt_token_ids(tokenizer, problem.question),
            "answer": problem.answer,
            "num_steps": problem.num_steps,
        }
        for problem in problems
    ]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lengths = sorted(len(tokenizer(problem.answer).input_ids) + 1 for problem in problems)
    return {
        "mean_steps": sum(problem.num_steps for problem in problems) / num_problems,
        "mean_answer_tokens": sum(lengths) / num_problems,
        "median_answer_tokens": lengths[num_problems // 2],
        "max_answer_tokens": lengths[-1],
    }


def main() -> None:
    """Make a bed and say what was measured of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the bed")
    parser.add_argument("--layers", type=int, help=f"of the target; {BedSettings.layers}, with --fast {FAST.layers}")
    parser.add_argument("--steps", type=int, help=f"of GRPO, 0 for none; {BedSettings.steps}, with --fast {FAST.steps}")
    parser.add_argument("--fast", action="store_true", help="a bed for tests, in less than a minute")
    args = parser.parse_args()
    given = {name: getattr(args, name) for name in ("layers", "steps") if getattr(args, name) is not None}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the training is ended too
    bed = make_bed(args.out, replace(FAST if args.fast else BedSettings(), **given))
    for part in (bed.policy, bed.target, bed.draft, *map(bed.problems, STEP_WEIGHTS_OF)):
        made = bed.made(part)
        shown = [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in made.items()
        ]
        print(f"{part}: {', '.join(text for text in shown if not text.startswith('settings'))}")


if __name__ == "__main__":
    main()
