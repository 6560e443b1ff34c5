"""Will it be faster here? The shipped core on a virtual clock, with engines that only wait.

`python -m rl_accel.lookahead.simulate a=0.7 c=0.1 [steps=5] [spread=0.3] [judge=0] [overhead=0] [g=3]`

Prints the speed-up over plain decoding by the number of target steps at a time, beside the closed form, and what the
target begins per step of the answer. With `g`, the speed-up of the target's steps by token speculation, `c` is meant
without it, and the figure that counts is the one over g.
"""

from __future__ import annotations

import asyncio
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rl_accel.errors import ConfigError
from rl_accel.lookahead import clock, formulas
from rl_accel.lookahead.core import Counts, Limits, Lookahead
from rl_accel.lookahead.step import Step
from rl_accel.lookahead.verify import Exact

END = -1
DEPTHS = (2, 3, 4, 6, 8, 16)
STEPS = 1200
"""Simulated by the command."""


@dataclass(frozen=True)
class Script:
    """Texts whose steps are one token each: how long a step takes the target, and whether the draft has the same."""

    lengths: Sequence[float]
    agrees: Sequence[bool]

    @classmethod
    def draw(cls, a: float, steps: int, spread: float = 0.0, seed: int = 0) -> Script:
        """Draw steps of mean length 1 (gamma distributed, `spread` is the standard deviation).

        Runs of agreeing steps are quantiles of their distribution, shuffled: 2 % would take 1e5 steps otherwise.
        """
        generator = random.Random(seed)
        lengths = [1.0] * steps
        if spread > 0:
            shape = 1 / spread**2
            lengths = [generator.gammavariate(shape, 1 / shape) for _ in range(steps)]
        num_runs = max(1, math.ceil(steps * (1 - a)))
        quantiles = [(i + 0.5) / num_runs for i in range(num_runs)]
        runs = [int(math.log(q) / math.log(a)) if 0 < a < 1 else (steps if a >= 1 else 0) for q in quantiles]
        generator.shuffle(runs)
        agrees = [agrees for run in runs for agrees in [True] * run + [False]][:steps]
        return cls(lengths, agrees + [a >= 1] * (steps - len(agrees)))


class ScriptedEngine:
    """Waits as long as a step of the script takes; a draft that does not agree says something else."""

    def __init__(self, script: Script, speed: float = 1.0, overhead: float = 0.0, is_draft: bool = False):
        self.script, self.speed, self.overhead, self.is_draft = script, speed, overhead, is_draft
        self.running = self.most_running = 0

    async def step(
        self, prefix_ids: Sequence[int], max_tokens: int, *, branch: int = 0, hint: Sequence[int] = ()
    ) -> Step:
        number = len(prefix_ids)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self.script.lengths[number] * self.speed + self.overhead)
        finally:
            self.running -= 1
        end = number == len(self.script.lengths) - 1
        says = number if not self.is_draft or self.script.agrees[number] else -2 - number
        return Step((says,), end=end)


class SlowVerifier(Exact):
    """Takes its time; verdicts follow each other where it is one at a time."""

    def __init__(self, seconds: float):
        self.seconds, self._one = seconds, asyncio.Lock()

    async def agree(self, prefix_ids: Sequence[int], draft: Step, target: Step) -> bool:
        async with self._one:
            await asyncio.sleep(self.seconds)
        return await super().agree(prefix_ids, draft, target)


@dataclass(frozen=True)
class Simulated:
    """Of all texts of a script."""

    speedup: float
    """Over the target alone."""
    counts: Counts
    most_target_steps: int
    """At a time."""


def simulate(
    script: Script, c: float, depth: int, *, judge: float = 0.0, overhead: float = 0.0, draft_overhead: float = 0.0,
    steps: int = 0,
) -> Simulated:  # fmt: skip
    """Decode the script by the shipped core.

    Args:
        steps: of a text, into which the script is cut; 0: one text.
    """
    steps = steps or len(script.lengths)
    texts = [
        Script(script.lengths[at : at + steps], script.agrees[at : at + steps])
        for at in range(0, len(script.lengths), steps)
    ]
    counts, most, plain, took = Counts(), 0, 0.0, 0.0
    for text in texts:
        target = ScriptedEngine(text, overhead=overhead)
        draft = ScriptedEngine(text, c, draft_overhead, is_draft=True)

        async def decode(text: Script = text, target: ScriptedEngine = target, draft: ScriptedEngine = draft) -> None:
            limits = Limits(max_tokens=len(text.lengths), step_tokens=1)
            verifier = SlowVerifier(judge) if judge else Exact()
            core = Lookahead(target, draft, verifier, limits, lambda: depth, counts=counts)
            said = [token async for final in core.steps(()) for token in final.step.token_ids]
            assert said == list(range(len(text.lengths))), "the answer is not the target's"

        took += clock.run(decode())[1]
        plain += sum(text.lengths)
        most = max(most, target.most_running)
    return Simulated(plain / took, counts, most)


def main(arguments: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: for a value that is missing, unknown or out of range.
    """
    known = {"a": -1.0, "c": -1.0, "steps": 0.0, "spread": 0.0, "judge": 0.0, "overhead": 0.0, "g": 1.0}
    for part in arguments:
        name, _, value = part.partition("=")
        if name not in known:
            raise ConfigError(f"{name} is unknown; known: {', '.join(known)}")
        try:
            known[name] = float(value)
        except ValueError:
            raise ConfigError(f"{name}={value} is not a number") from None
    a, c, steps, g = known["a"], known["c"], int(known["steps"]), known["g"]
    if not (0 <= a <= 1 and c > 0 and g >= 1):
        raise ConfigError("usage: python -m rl_accel.lookahead.simulate a=<0 to 1> c=<over 0> " + " ".join(
            f"[{name}={value:g}]" for name, value in known.items() if name not in "ac"))  # fmt: skip
    script = Script.draw(a, steps * max(1, STEPS // steps) if steps else STEPS, known["spread"])
    speedups = {}
    print(
        f"{'depth':>5} {'speed-up':>9} {'closed form':>12} {'target steps a step':>20}" + ("  over g" if g > 1 else "")
    )
    for depth in DEPTHS:
        found = simulate(script, c * g, depth, judge=known["judge"], overhead=known["overhead"], steps=steps)
        form = formulas.asynchronous(
            a, c * g, depth, steps=steps or math.inf, judge=known["judge"], overhead=known["overhead"]
        )
        speedups[depth] = found.speedup
        begun = found.counts.target_steps / len(script.lengths)
        over = f"  {found.speedup:6.2f}" if g > 1 else ""
        print(f"{depth:5d} {g * found.speedup:9.2f} {g * form:12.2f} {begun:20.2f}{over}")
    best = max(speedups, key=lambda depth: (round(speedups[depth], 2), -depth))
    print(f"full depth {formulas.full_depth(c * g)}; best of these {best}")


if __name__ == "__main__":
    main(sys.argv[1:])
