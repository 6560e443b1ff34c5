"""What step verifiers let in, and what that does to accuracy: python scripts/lookahead_accuracy.py [options].

Every verifier writes the same problems, with the same noise, as the target alone does; the difference of accuracy is
paired by problem, with its standard error. Latency is seconds a text, one text at a time, over the target alone, in
interleaved blocks of the first problems. `judge` is left out: it needs a language model that can judge.

Table: verifier x temperature -> share of steps from the draft, accuracy, difference, speed-up, verdicts and their time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from lookahead_arms import REQUEST_S, START_S, THREADS, Arm, Engines, Problem, Writer
from make_lookahead_bed import BedSettings, make_bed
from transformers import AutoTokenizer

from rl_accel.lookahead.endpoint import open_session
from rl_accel.lookahead.server import Server
from rl_accel.lookahead.step import Verifier
from rl_accel.lookahead.text import delimiter_ids
from rl_accel.lookahead.verifiers import make_verifier
from rl_accel.quickstart.reward import compute_score

VERIFIERS = ("exact", "numbers", "likelihood", "hidden", "random", "always")


@dataclass
class Asked(Problem):
    """A problem whose answer is known."""

    answer: str


def read(path: Path, num: int) -> list[Asked]:
    rows = [json.loads(line) for line in path.read_text().splitlines()[:num]]
    return [Asked(row["problem_id"], row["prompt_token_ids"], row["answer"].split("####")[-1].strip()) for row in rows]


def pooling_server(bed: Any, folder: Path) -> Server:
    """Return the server of the target's hidden states."""
    args = ["--runner", "pooling", "--pooler-config.task", "token_embed", "--dtype", "float32", "--enforce-eager"]
    args += ["--max-model-len", "656"]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING", **THREADS}
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return Server(str(bed.target), args, folder / "pooling.log", env=env)


async def judged(
    writer: Writer, tokenizer: Any, arm: Arm, problems: Sequence[Asked], temperature: float, at_a_time: int
) -> dict[str, Any]:
    """Return what an arm wrote: right or wrong a problem, seconds and agreement."""
    seconds, texts = await writer.block(arm, problems, temperature, at_a_time)
    right = [
        compute_score("", tokenizer.decode(text.token_ids, skip_special_tokens=True), problem.answer)["acc"]
        for text, problem in zip(texts, problems, strict=True)
    ]
    agreed = [flag for text in texts for flag in text.agreed]
    return {"right": right, "seconds": seconds, "agreement": statistics.fmean(agreed) if agreed else 0.0}


async def measure(args: argparse.Namespace, bed: Any, folder: Path) -> list[dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(bed.target)
    problems = read(bed.problems(args.problems), args.num)
    engines = Engines(bed, folder, args.max_draft, 8, THREADS)
    plain, look = Arm.named("plain"), Arm.named(args.arm)
    hidden: Server | None = None
    rows: list[dict[str, Any]] = []
    try:
        engines.start(["target:none", *look.engines])
        if "hidden" in args.verifiers:
            hidden = pooling_server(bed, folder)
            hidden.wait(START_S)
        async with open_session(REQUEST_S) as session:
            writer = Writer(engines, session, delimiter_ids(tokenizer, "\n"), tokenizer.eos_token_id)
            for temperature in map(float, args.temperatures.split(",")):
                wanted = await judged(writer, tokenizer, plain, problems, temperature, args.at_a_time)
                for name in args.verifiers.split(","):
                    writer.verifier = verifier_of(name, session, engines, look, hidden, tokenizer)
                    row = await compared(writer, tokenizer, plain, look, problems, temperature, wanted, args)
                    rows.append({"verifier": name, "temperature": temperature, **row})
                    print(json.dumps(rows[-1]), flush=True)
    finally:
        engines.stop()
        if hidden is not None:
            hidden.stop()
    return rows


def verifier_of(
    name: str, session: aiohttp.ClientSession, engines: Engines, look: Arm, hidden: Server | None, tokenizer: Any
) -> Verifier:
    """Return a verifier with its defaults."""
    url = hidden.url if name == "hidden" and hidden is not None else None
    return make_verifier(
        name, session=session, target_url=engines.url(look.target), sampling={}, decode=tokenizer.decode,
        verifier_url=url,
    )  # fmt: skip


async def compared(
    writer: Writer, tokenizer: Any, plain: Arm, look: Arm, problems: Sequence[Asked], temperature: float,
    wanted: dict[str, Any], args: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """Return accuracy beside that of the target alone, and the speed of one text at a time."""
    found = await judged(writer, tokenizer, look, problems, temperature, args.at_a_time)
    differences = [one - other for one, other in zip(found["right"], wanted["right"], strict=True)]
    cost = getattr(writer.verifier, "cost", None)
    verdict = {"verdicts": cost.calls, "verdict_ms": 1e3 * cost.seconds / max(cost.calls, 1)} if cost else {}
    ratios = []
    for block in range(args.blocks):
        chosen, took = problems[block * args.texts : (block + 1) * args.texts], {}
        for arm in (plain, look) if block % 2 else (look, plain):
            took[arm.name] = (await judged(writer, tokenizer, arm, chosen, temperature, 1))["seconds"]
        ratios.append(took[plain.name] / took[look.name])
    return {
        "n": len(problems), "agreement": found["agreement"], "accuracy": statistics.fmean(found["right"]),
        "target_accuracy": statistics.fmean(wanted["right"]), "difference": statistics.fmean(differences),
        "standard_error": statistics.stdev(differences) / math.sqrt(len(differences)),
        **({"speedup": statistics.median(ratios), "speedup_spread": [min(ratios), max(ratios)]} if ratios else {}),
        **verdict,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bed", type=Path, default=Path.home() / ".cache" / "rl_accel" / "lookahead_bed")
    parser.add_argument("--layers", type=int, default=24, help="of the target")
    parser.add_argument("--problems", default="mix")
    parser.add_argument("--num", type=int, default=600)
    parser.add_argument("--verifiers", default=",".join(VERIFIERS))
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--arm", default="look+hint")
    parser.add_argument("--max-draft", type=int, default=24)
    parser.add_argument("--at-a-time", type=int, default=16, help="texts, where accuracy is measured")
    parser.add_argument("--blocks", type=int, default=5, help="where speed is measured; 0: not")
    parser.add_argument("--texts", type=int, default=6, help="in a block")
    args = parser.parse_args()
    bed = make_bed(args.bed, BedSettings(layers=args.layers))
    with tempfile.TemporaryDirectory() as folder:
        rows = asyncio.run(measure(args, bed, Path(folder)))
    if args.json:
        args.json.write_text(json.dumps({"arm": args.arm, "layers": args.layers, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
