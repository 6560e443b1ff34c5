"""How far a quantized KV cache moves a policy, by format and with outliers in K, against vLLM's formats.

    python scripts/kv_accuracy.py [--model PATH] [--data FILE] [--columns none,1x16] [--rows none,fp8] [--json FILE]

The policy (default: the quickstart's) answers problems at temperature 1, and its answers go through it again with K and
V as each format keeps them; reported is the mean over tokens of KL to the policy with K and V in float32, over the
vocabulary. vLLM's formats are emulated (rl_accel/kvcache/formats.py). Columns: outliers injected into K, named
`pairs`x`factor`, that leave the policy as it is to the last bit (checked); ours, not a model's. Which RoPE pairs they
hit is drawn, and KL has a long tail, so columns are means over `--draws`, with standard errors.

Rows: `kv.kl.<column>`, the default setting against `int4_per_token_head`; `.int4`, without INT8 in layer 0; `.fp8` and
`.same_layer0`, the default setting against fp8 and against `int4_per_token_head` with layer 0 not quantized;
`kv.table.<column>.<format>`, everything, against `int4_per_token_head`. `draws_won`: of how many draws.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch

import rl_accel
from rl_accel import machine
from rl_accel.errors import KVCacheError
from rl_accel.hosts import versions
from rl_accel.kvcache import accuracy, formats
from rl_accel.quickstart import problems

POLICY = Path(rl_accel.__file__).parent / "quickstart" / "policy"
PAGED_TOKENS = 24
"""Of the response that goes through real pages: the specification is slow."""
HEADLINES = {
    "": (formats.OURS, formats.INCUMBENT),
    ".int4": (formats.OURS_INT4, formats.INCUMBENT),
    ".fp8": (formats.OURS, "fp8"),
    ".same_layer0": (formats.OURS, f"{formats.INCUMBENT}.layer0_exact"),
}


def questions(path: Path | None, num: int, seed: int) -> list[Any]:
    """Return what is put to the policy: a text or chat messages.

    Raises:
        SystemExit: for a file without `question` or `prompt`, or with too few rows.
    """
    if path is None:
        return [problem.question for problem in problems.generate(num, seed=seed)]
    if path.suffix == ".parquet":
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(path).to_pylist()
    else:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(rows) < num:
        sys.exit(f"{path} has {len(rows)} rows; {num} are needed: fewer --prompts?")
    random.Random(seed).shuffle(rows)
    found = [row.get("prompt", row.get("question")) for row in rows[:num]]
    if not all(found):
        sys.exit(f"{path}: rows need a `question` or a `prompt`; got {', '.join(rows[0])}")
    return found


def tokenize(tokenizer: Any, question: Any) -> list[int]:
    messages = question if isinstance(question, list) else [{"role": "user", "content": question}]
    if tokenizer.chat_template is None:
        return tokenizer("\n".join(message["content"] for message in messages))["input_ids"]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])


def possible_columns(model: Any, columns: list[str]) -> list[str]:
    """Return the columns less those with outliers where the model can have none."""
    try:
        with accuracy.outliers(model, 1, 1):
            return columns
    except KVCacheError as error:
        print(f"columns with outliers are left out: {error}")
        return [column for column in columns if column == "none"]


def check_pages(model: Any, sample: accuracy.Sample) -> dict[str, Any]:
    """Compare the default setting read from real pages, all rounding included, with what this script reads."""
    sample = accuracy.Sample(sample.prompt, sample.response[:PAGED_TOKENS])
    layers = model.config.get_text_config().num_hidden_layers
    bits = [8, *[4] * (layers - 1)]
    paged = accuracy.paged_log_probs(model, sample, 16, bits, "torch" if model.device.type == "cpu" else "auto")
    read = accuracy.log_probs(model, sample, formats.PagedFormat([16], first_layer_bits=8))
    exact = accuracy.log_probs(model, sample)
    found = accuracy.Divergence()
    found.add(read, paged, torch.tensor(sample.response, device=model.device))
    means = found.means()
    kl = float((exact.exp() * (exact - read)).sum(-1).mean())
    print(f"pages: KL {means['kl']:.2e} of what is read to attention of the specification, {kl:.2e} of float32 to it")
    return row("kv.pages", means["kl"], kl, tokens=found.tokens, log_prob=means["log_prob"])


def row(name: str, value: float, incumbent: float | None, **more: Any) -> dict[str, Any]:
    ratio = incumbent / value if incumbent is not None and value else None
    return {"name": name, "value": value, "unit": "nats", "incumbent": incumbent, "ratio": ratio, "bound": None, **more}


def headlines(column: str, results: dict[str, list[accuracy.Divergence]]) -> list[dict[str, Any]]:
    rows = []
    for suffix, (ours, theirs) in HEADLINES.items():
        if ours in results and theirs in results:
            draws = list(zip(results[ours], results[theirs], strict=True))
            found, others = accuracy.summarize(results[ours]), accuracy.summarize(results[theirs])
            won = sum(a.kl < b.kl for a, b in draws)
            rows.append(row(
                f"kv.kl.{column}{suffix}", found["kl"], others["kl"], error=found["kl_error"],
                incumbent_error=others["kl_error"], draws=len(draws), draws_won=won,
            ))  # fmt: skip
    return rows


def table(results: dict[str, dict[str, list[accuracy.Divergence]]]) -> str:
    """Return the KL of all formats and columns as Markdown."""
    columns = list(results)
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in results[columns[0]]:
        cells = [accuracy.summarize(results[column][name]) for column in columns]
        texts = [
            f"{cell['kl']:.2e}" + (f" ± {cell['kl_error'] / cell['kl']:.0%}" if cell["kl"] and cell["kl_error"] else "")
            for cell in cells
        ]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(POLICY), help="a causal language model of transformers")
    parser.add_argument("--data", type=Path, help="JSONL or parquet with `question` or `prompt`; default: generated")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=1, help="of a prompt")
    parser.add_argument("--calibration", type=int, default=8, help="further prompts, for shifts and orders")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--draws", type=int, default=8, help="of the RoPE pairs that become outliers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=5, help="of problems and answers")
    parser.add_argument("--columns", default=",".join(accuracy.COLUMNS))
    parser.add_argument("--rows", help="of the table; default: all")
    parser.add_argument("--json", type=Path, help="write the results as a list of {name, value, unit, ...}")
    return parser.parse_args()


def main() -> None:
    options = parse()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1 if options.model == str(POLICY) else torch.get_num_threads())  # tiny: threads only wait
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(options.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    asked = questions(options.data, options.prompts + options.calibration, options.seed)
    prompts = [tokenize(tokenizer, question) for question in asked]
    draw = {"max_tokens": options.max_tokens, "seed": options.seed}
    samples = accuracy.draw_samples(model, prompts[: options.prompts], options.samples, **draw)
    calibration = accuracy.draw_samples(model, prompts[options.prompts :], 1, **draw)
    tokens = sum(len(sample.response) for sample in samples)
    print(f"{len(samples)} answers with {tokens} tokens; calibration: {len(calibration)} texts")
    rows, results = [check_pages(model, samples[0])], {}
    chosen = options.rows.split(",") if options.rows else None
    for column in possible_columns(model, options.columns.split(",")):
        found = accuracy.measure(model, samples, calibration, column, chosen, options.draws)
        results[column] = found
        rows += headlines(column, found)
        theirs = accuracy.summarize(found[formats.INCUMBENT])["kl"] if formats.INCUMBENT in found else None
        for name, draws in found.items():
            means = accuracy.summarize(draws)
            rows.append(row(f"kv.table.{column}.{name}", means.pop("kl"), theirs, **means))
        print(f"{column}: done", flush=True)
    print(table(results))
    if options.json:
        conditions = {
            "command": " ".join(sys.argv), "machine": machine.describe(), "versions": versions.report(),
            "model": "quickstart" if options.model == str(POLICY) else options.model, "tokens": tokens,
        }  # fmt: skip
        rows.append({"name": "kv.conditions", "value": None, **conditions})
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
