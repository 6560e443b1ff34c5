"""The drafter and the cost of drafts: they stop where they cost more than they save, and stragglers draft more."""

from __future__ import annotations

import random

import numpy as np
import pytest

from rl_accel.draft import DraftConfig, SuffixDrafter
from rl_accel.draft.planner import PLAN_EVERY, PROBE_EVERY, UNDRAFTED_EVERY

TEXT = list(range(10, 110))
CHEAP, EXPENSIVE = (0.01, 1e-4, 1e-5), (0.01, 1e-4, 0.02)
"""Seconds of a step, of a request, of a draft token."""


def das(**settings) -> DraftConfig:
    return DraftConfig(method="das", **settings)


class Engine:
    """Decodes for a drafter: every request's text is known, a step takes what the model of costs says."""

    def __init__(self, drafter: SuffixDrafter, texts: dict[str, list[int]], problems: dict[str, str] | None = None):
        self.drafter, self.texts, self.at = drafter, texts, dict.fromkeys(texts, 0)
        self.costs, self.noise = CHEAP, random.Random(0)
        for name in texts:
            drafter.begin(name, (problems or {}).get(name, "p"), [1])
        self.fresh = {name: [text[0]] for name, text in texts.items()}

    def one_pass(self, observe: bool = True) -> dict[str, list[int]]:
        names = list(self.texts)
        drafts = dict(zip(names, self.drafter.propose(names, [self.fresh[n] for n in names], 16), strict=True))
        for name, draft in drafts.items():
            text, at = self.texts[name], self.at[name]
            right = 0
            while right < len(draft) and draft[right] == text[(at + 1 + right) % len(text)]:
                right += 1
            self.fresh[name] = [text[(at + 1 + k) % len(text)] for k in range(right + 1)]
            self.at[name] = at + 1 + right
        num_drafted = sum(map(len, drafts.values()))
        if observe:
            base, per_request, per_draft = self.costs
            seconds = (base + per_request * len(names) + per_draft * num_drafted) * self.noise.lognormvariate(0.0, 0.05)
            self.drafter.observe_step(seconds, len(names), num_drafted)
        return drafts


def phrase(seed: int) -> list[int]:
    return random.Random(seed).choices(range(50, 3000), k=300)


def variants(number: int, seed: int, noise: float = 0.2, length: int = 3000) -> list[list[int]]:
    """Texts that repeat a phrase; a share `noise` of their tokens is changed at random."""
    rng, whole = random.Random(seed + 1), (phrase(seed) * (length // 300 + 1))[:length]
    return [[rng.randrange(50, 3000) if rng.random() < noise else t for t in whole] for _ in range(number)]


def engine_with_history(teach, seed: int = 0, **settings) -> Engine:
    """Eight requests whose tokens are those of an earlier epoch, one in five excepted."""
    drafter = SuffixDrafter(das(num_speculative_tokens=16, **settings), seed=seed)
    teach(drafter, "p", phrase(seed))
    drafter.close_epoch(0)
    return Engine(drafter, {f"r{i}": text for i, text in enumerate(variants(8, seed))})


def test_without_prices_drafts_are_as_long_as_allowed(teach) -> None:
    drafter = SuffixDrafter(das(num_speculative_tokens=16))
    teach(drafter, "p", TEXT)
    drafter.close_epoch(0)
    engine = Engine(drafter, {"r0": TEXT, "r1": TEXT})
    engine.one_pass(observe=False)  # what is matched by one token only is not long
    assert [len(engine.one_pass(observe=False)["r1"]) for _ in range(4)] == [16] * 4


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_expensive_drafts_stop_and_come_back_when_they_are_cheap(teach, seed) -> None:
    """A closed loop: step times, with 5 percent noise, follow from the drafts that the drafter made.

    Both failed: steps without drafts outweighed those with drafts, so that the fit was taken for unready and drafts
    went on; and a probe was over before the fit believed that times had changed, so that drafts stayed off.
    """
    engine = engine_with_history(teach, seed)
    engine.costs = EXPENSIVE
    sizes = [sum(map(len, engine.one_pass().values())) for _ in range(600)]
    assert sum(sizes[:20]) > 100, "costs have to be learned from drafts"
    probes = [i for i in range(200, 600) if sizes[i]]
    assert len(probes) <= (PLAN_EVERY + 1) * (400 // PROBE_EVERY + 1), "drafts only to probe"
    engine.costs = CHEAP
    sizes = [sum(map(len, engine.one_pass().values())) for _ in range(PROBE_EVERY + 12 * PLAN_EVERY)]
    tail = np.array(sizes[-6 * PLAN_EVERY :])
    assert np.mean(tail > 0) > 0.95, "cheap drafts came back and stay"
    assert tail.mean() > 16


def test_cheap_drafts_go_on(teach) -> None:
    engine = engine_with_history(teach)
    sizes = [sum(map(len, engine.one_pass().values())) for _ in range(400)]
    undrafted = [i for i in range(100, 400) if not sizes[i]]
    assert len(undrafted) <= 300 // UNDRAFTED_EVERY + 1, "only to see what a step without drafts takes"
    assert np.mean(sizes[100:]) > 16


def test_the_fixed_policy_drafts_to_the_cap_whatever_it_costs(teach) -> None:
    drafter = SuffixDrafter(das(num_speculative_tokens=16, policy="fixed"))
    teach(drafter, "p", TEXT * 20)
    drafter.close_epoch(0)
    engine = Engine(drafter, {"r0": TEXT, "r1": TEXT})
    engine.costs = EXPENSIVE
    assert [len(engine.one_pass()["r1"]) for _ in range(100)][1:] == [16] * 99


def test_classes_give_long_requests_all_and_short_ones_nothing(teach) -> None:
    drafter, rng = SuffixDrafter(das(num_speculative_tokens=16, policy="classes")), random.Random(0)
    for _ in range(60):
        for problem, least in (("short", 5), ("medium", 45), ("long", 85)):
            teach(drafter, problem, TEXT[: rng.randint(least, least + 15)])
    drafter.close_epoch(0)
    for problem in ("short", "medium", "long"):
        drafter.begin(problem, problem, [1])
    sizes = [len(d) for d in drafter.propose(["short", "medium", "long"], [TEXT[:1]] * 3, 16)]
    assert sizes == [0, 4, 16]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_budget_lets_stragglers_draft_more(teach, seed) -> None:
    """64 requests of like texts; the four whose earlier rollouts were long draft on where drafts are expensive."""
    drafter = SuffixDrafter(das(num_speculative_tokens=16, cross_problems=False), seed=seed)
    names, noise = [f"r{i}" for i in range(64)], random.Random(seed)
    for i, name in enumerate(names):
        for text in variants(4, seed + i, length=1500 if i >= 60 else 300):
            teach(drafter, name, text)
    drafter.close_epoch(0)
    for _ in range(200):
        n, d = noise.randint(1, 64), noise.randint(0, 200)
        drafter.observe_step((0.02 + 5e-4 * d) * noise.lognormvariate(0.0, 0.02), n, d)
    assert drafter.planner.cost.ready
    engine = Engine(drafter, {n: variants(5, seed + i)[4] for i, n in enumerate(names)}, {n: n for n in names})
    engine.costs = (0.02, 0.0, 5e-4)
    sizes = np.mean([[len(draft) for draft in engine.one_pass().values()] for _ in range(60)], axis=0)
    assert sizes[60:].mean() > 1.0
    assert sizes[60:].mean() > 2.0 * sizes[:60].mean()
    assert max(engine.at[n] for n in names[:60]) < 300, "nobody is beyond its history"
