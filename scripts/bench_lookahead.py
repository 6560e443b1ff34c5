"""What lookahead brings over plain decoding and over token speculation: python scripts/bench_lookahead.py [options].

Engines are `vllm serve` processes with exact sampling, which are all up and of which only an arm's own have work. Every
arm writes the same texts, blocks of them in a rotating order, and has to write the same tokens. The bed is that of
`make_lookahead_bed.py`, made on first use.

Arms: `plain`; `ahead`: the draft goes on writing in a process beside the target's engine, which verifies what is there
(`draft.method=ahead`); `das`, `ngram`, `suffix`, `model`: the target alone with these token drafts; `look`, `look+das`,
`look+model`: lookahead over such a target; `look+hint`: over `das`, which is also given the draft's steps; and each of
the latter with `@das`: the draft's own engine drafts tokens, too. `model=16`, `ahead=32`: drafts of so many tokens.

Rows: `lookahead.speedup` (seconds of plain / best lookahead arm), `.over_token` (best token arm / best lookahead arm),
`.simulator_error` (predicted by the core on the virtual clock from measured steps / measured - 1, the worst arm),
`.identical` (share of texts with the same tokens over temperatures, depths, widths, hints and texts at a time), and
`.switched_worst` (seconds of an arm that turns itself off / plain, worst of 1 to 32 texts at a time).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lookahead_arms import REQUEST_S, THREADS, Arm, Engines, Problem, Writer, Written, read_problems
from lookahead_prediction import predict_ahead, predict_lookahead
from make_lookahead_bed import Bed, BedSettings, make_bed

from rl_accel.lookahead.endpoint import open_session
from rl_accel.lookahead.switch import Switch
from rl_accel.lookahead.text import delimiter_ids


async def speed(
    writer: Writer, arms: Sequence[Arm], problems: Sequence[Problem], temperature: float, blocks: int, texts: int,
    at_a_time: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Time the arms on blocks of the same texts; the first block warms up."""
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    ahead: dict[str, list[Written]] = {arm.name: [] for arm in arms}
    num_tokens = 0
    for block in range(blocks + 1):
        chosen = problems[block * texts : (block + 1) * texts]
        assert len(chosen) == texts, "too few problems"
        wanted: list[list[int]] | None = None
        turn = block % len(arms)
        for arm in [*arms[turn:], *arms[:turn]]:
            took, written = await writer.block(arm, chosen, temperature, at_a_time)
            said = [text.token_ids for text in written]
            assert wanted is None or said == wanted, f"{arm.name} writes other tokens"
            wanted = said
            if block:
                seconds[arm.name].append(took)
                ahead[arm.name] += written
        num_tokens += sum(map(len, wanted or [])) if block else 0
        print(f"block {block}  " + "  ".join(f"{n} {s[-1]:.2f}" for n, s in seconds.items() if s), flush=True)
    rows: dict[str, Any] = {"tokens": num_tokens, "temperature": temperature, "at_a_time": at_a_time, "arms": {}}
    plain = seconds["plain"]
    for arm in arms:
        ratios = [one / other for one, other in zip(plain, seconds[arm.name], strict=True)]
        row: dict[str, Any] = {
            "ms_per_token": 1e3 * sum(seconds[arm.name]) / num_tokens,
            "speedup": statistics.median(ratios), "speedup_spread": [min(ratios), max(ratios)],
        }  # fmt: skip
        if arm.draft:
            begun = sum(text.counts.target_steps for text in ahead[arm.name])
            row["target_steps_a_step"] = begun / sum(len(text.agreed) for text in ahead[arm.name])
            row |= await predict_lookahead(writer, arm, problems[: 2 * texts], temperature)
        if arm.target.startswith("target:ahead"):
            bed, length = writer.engines.bed, writer.engines.draft_length_of(arm.target)
            row |= await predict_ahead(writer, bed.draft, length, problems[: 2 * texts], temperature)
        if "predicted_ms_per_token" in row:
            row["of_predicted"] = row["predicted_ms_per_token"] / row["ms_per_token"]
        rows["arms"][arm.name] = row
    return rows


async def identity(writer: Writer, engines: Engines, problems: Sequence[Problem]) -> dict[str, Any]:
    """Compare tokens with those of plain decoding over temperatures, depths, widths, hints and texts at a time."""
    variants = [
        ("look", {"depth": 2}, 1), ("look", {"depth": 8}, 16), ("look", {"depth": 4, "width": 2}, 8),
        ("look+hint", {"depth": 8}, 16), ("look+hint", {"depth": 3, "width": 2}, 4), ("look+model", {"depth": 8}, 32),
        ("ahead", {}, 16), ("ahead", {}, 2),
    ]  # fmt: skip
    arms = [(Arm.named(name), options, n) for name, options, n in variants]
    engines.start(["target:none", *dict.fromkeys(e for arm, _, _ in arms for e in arm.engines)])
    rows, same, total = [], 0, 0
    for temperature in (0.0, 0.6, 1.0):
        _, plain = await writer.block(Arm.named("plain"), problems, temperature, 32)
        for number, (arm, options, at_a_time) in enumerate(arms):
            # The usual ways all problems, the other variants their share.
            whole = (arm.name, at_a_time, options.get("depth", 8)) in (("look+hint", 16, 8), ("ahead", 16, 8))
            chosen = range(len(problems)) if whole else range(number, len(problems), len(arms))
            varied = Arm(arm.name, arm.target, arm.draft, arm.hint, **options)
            writer.switches.pop(arm.name, None)
            _, written = await writer.block(varied, [problems[i] for i in chosen], temperature, at_a_time)
            equal = sum(text.token_ids == plain[i].token_ids for i, text in zip(chosen, written, strict=True))
            agreed = [flag for text in written for flag in text.agreed]
            row = {"temperature": temperature, "arm": arm.name, **options, "at_a_time": at_a_time}
            row |= {"agreement": statistics.fmean(agreed)} if agreed else {}
            rows.append(row | {"texts": len(written), "identical": equal})
            print(rows[-1], flush=True)
            same, total = same + equal, total + len(written)
    return {"variants": rows, "texts": total, "identical": same / total}


async def crossover(
    writer: Writer, arm: Arm, problems: Sequence[Problem], temperature: float, blocks: int, sizes: Sequence[int]
) -> dict[str, Any]:
    """Compare an arm that turns itself off with plain decoding at 1 to 32 texts at a time; what it has learned stays,
    as in a server."""
    rows = []
    for at_a_time in sizes:
        switch = Switch(arm.depth)
        texts = max(16, 2 * at_a_time)
        ratios = []
        for block in range(-4, blocks):  # the first ones let the switch learn
            chosen = [problems[(block * texts + i) % len(problems)] for i in range(texts)]
            order = (arm, Arm.named("plain")) if block % 2 else (Arm.named("plain"), arm)
            took = {}
            for one in order:
                took[one.name], _ = await writer.block(
                    one, chosen, temperature, at_a_time, switch if one is arm and arm.draft else None
                )
            if block >= 0:
                ratios.append(took[arm.name] / took["plain"])
        row = {"at_a_time": at_a_time, "over_plain": statistics.median(ratios)}
        rows.append(row | {"spread": [min(ratios), max(ratios)], "gains": switch.gains()})
        print(rows[-1], flush=True)
    return {"arm": arm.name, "rows": rows, "worst": max(row["over_plain"] for row in rows)}


async def main_async(args: argparse.Namespace, bed: Bed, folder: Path, found: dict[str, Any]) -> None:
    """Fill `found` part by part; what was measured before a failure stays."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bed.target)
    engines = Engines(bed, folder, args.max_draft, args.draft_length, THREADS if args.threads == 1 else {})
    arms = [Arm.named(name, args.depth) for name in args.arms.split(",")]
    try:
        async with open_session(REQUEST_S) as session:
            writer = Writer(engines, session, delimiter_ids(tokenizer, "\n"), tokenizer.eos_token_id)
            if "speed" in args.what:
                engines.start(list(dict.fromkeys(engine for arm in arms for engine in arm.engines)))
                found["speed"] = {}
                for name in args.problems.split(","):
                    problems = read_problems(bed.problems(name))
                    for temperature in map(float, args.temperatures.split(",")):
                        found["speed"][f"{name} T={temperature:g}"] = await speed(
                            writer, arms, problems, temperature, args.blocks, args.texts, args.at_a_time
                        )
            if "identity" in args.what:
                problems = read_problems(bed.problems("mix"))[: args.identity]
                found["identity"] = await identity(writer, engines, problems)
            if "crossover" in args.what:
                problems = read_problems(bed.problems("long"))
                found["crossover"] = []
                sizes = [int(size) for size in args.switched_at.split(",")]
                for name in args.switched.split(","):
                    arm = Arm.named(name, args.depth)
                    engines.start(["target:none", *arm.engines])
                    found["crossover"].append(await crossover(writer, arm, problems, 1.0, args.blocks, sizes))
    finally:
        engines.stop()


def rows_of(found: dict[str, Any]) -> dict[str, float]:
    """Return the rows that the docstring names, of what was measured."""
    rows: dict[str, float] = {}
    for what, measured in found.get("speed", {}).items():
        arms = measured["arms"]
        ahead = {name: arm for name, arm in arms.items() if name.startswith(("ahead", "look"))}
        token = [arm["ms_per_token"] for name, arm in arms.items() if name not in (*ahead, "plain")]
        if ahead:
            best = min(arm["ms_per_token"] for arm in ahead.values())
            rows[f"lookahead.speedup {what}"] = arms["plain"]["ms_per_token"] / best
            rows[f"lookahead.simulator_error {what}"] = min(arm["of_predicted"] for arm in ahead.values()) - 1
            if token:
                rows[f"lookahead.over_token {what}"] = min(token) / best
    if "identity" in found:
        rows["lookahead.identical"] = found["identity"]["identical"]
    if found.get("crossover"):
        rows["lookahead.switched_worst"] = max(measured["worst"] for measured in found["crossover"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bed", type=Path, default=Path.home() / ".cache" / "rl_accel" / "lookahead_bed")
    parser.add_argument("--as-is", action="store_true", help="take the bed as it is there")
    parser.add_argument("--layers", type=int, default=24, help="of the target")
    parser.add_argument("--what", default="speed,identity,crossover")
    parser.add_argument("--arms", default="plain,ngram,das,model,look,look+das,look+model,look+hint")
    parser.add_argument("--problems", default="long")
    parser.add_argument("--temperatures", default="1.0")
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--texts", type=int, default=8, help="in a block")
    parser.add_argument("--at-a-time", type=int, default=1)
    parser.add_argument("--identity", type=int, default=512, help="problems that are compared")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--max-draft", type=int, default=16, help="longest token draft of das and hints")
    parser.add_argument("--draft-length", type=int, default=8, help="token draft of `model`")
    parser.add_argument("--switched", default="look+hint,ahead", help="arms of the crossover")
    parser.add_argument("--switched-at", default="1,4,8,16,32", help="texts at a time there")
    parser.add_argument("--threads", type=int, default=1, help="1: an engine computes on one core; 0: vLLM's choice")
    args = parser.parse_args()
    bed = Bed(args.bed) if args.as_is else make_bed(args.bed, BedSettings(layers=args.layers))
    found: dict[str, Any] = {"layers": args.layers, "draft_length": args.draft_length, "max_draft": args.max_draft}
    try:
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(main_async(args, bed, Path(folder), found))
    finally:
        found["rows"] = rows_of(found)
        print(json.dumps(found, indent=1))
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
