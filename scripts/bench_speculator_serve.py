"""A server whose traffic changes: python scripts/bench_speculator_serve.py --gsm8k FOLDER [--json FILE] [options].

`rl_accel.speculator.serve` is sent requests by the `openai` client: A, the synthetic problems in the chat template;
then B, questions of GSM8K as plain text, which the same policy answers quite differently; then A again. Another server
with the head of the end of A, which does not learn, is sent the same B and A, and has to answer with the same tokens.
Drafts have a fixed length, temperature is 1; time is not measured. Accept length: 1 + accepted tokens / drafts.

Rows: `speculator.shift_gain` (accept length of all of B, learning / frozen; `later`: of its last quarter),
`speculator.shift_recovery_requests` (requests of B until a block has 95 % of the accept length of its last quarter),
`speculator.return_share` (first block of the second A / last quarter of the first A) and
`speculator.return_recovery_requests`. Seeds that FILE already has are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

BLOCK, AT_ONCE, DRAFT = 32, 16, 4
MAX_TOKENS = 64
PLATEAU = 0.95
Question = tuple[str, str]
"""Domain and text."""


class Server:
    """`python -m rl_accel.speculator.serve` on a free port, as a context."""

    def __init__(self, model: str, state: Path, *options: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [
            sys.executable, "-m", "rl_accel.speculator.serve", "--model", model, "--state", str(state),
            "rl_accel.draft.method=head", "rl_accel.draft.policy=fixed",
            f"rl_accel.draft.num_speculative_tokens={DRAFT}",
            "--served-model-name", "policy", "--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32",
            "--enforce-eager", "--max-model-len", "640", "--max-num-seqs", str(AT_ONCE), "--block-size", "32",
            "--generation-config", "vllm", "--disable-uvicorn-access-log", *options,
        ]  # fmt: skip

    def __enter__(self) -> Server:
        from openai import OpenAI

        quiet = {
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        self.process = subprocess.Popen(self.command, env={**quiet, **os.environ})
        end = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health").close()
                break
            except OSError:
                if self.process.poll() is not None or time.monotonic() > end:
                    self.__exit__()
                    raise SystemExit("the server did not come up") from None
                time.sleep(0.2)
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=300)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)

    def metrics(self) -> dict[str, float]:
        """Return the metrics of rl_accel by their names without prefix."""
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            lines = [line.split() for line in answer.read().decode().splitlines() if line.startswith("rl_accel_")]
        return {name.removeprefix("rl_accel_"): float(value) for name, value in lines}

    def ask(self, question: Question, seed: int) -> list[int]:
        """Return the tokens of an answer."""
        domain, text = question
        options: Any = {
            "model": "policy", "temperature": 1.0, "max_tokens": MAX_TOKENS, "seed": seed,
            "extra_body": {"return_token_ids": True},
        }  # fmt: skip
        if domain == "A":
            answer = self.client.chat.completions.create(messages=[{"role": "user", "content": text}], **options)
        else:
            answer = self.client.completions.create(prompt=text, **options)
        return answer.choices[0].token_ids

    def serve(self, questions: list[Question], first_seed: int, label: str) -> list[dict[str, Any]]:
        """Send questions by blocks; returns what came of each block."""
        found, before = [], self.metrics()
        with ThreadPoolExecutor(AT_ONCE) as threads:
            for start in range(0, len(questions), BLOCK):
                block = questions[start : start + BLOCK]
                seeds = range(first_seed + start, first_seed + start + len(block))
                tokens = list(threads.map(self.ask, block, seeds))
                after = self.metrics()
                counts = {name: after[f"draft_num_{name}_total"] - before[f"draft_num_{name}_total"] for name in COUNTS}
                found.append({**counts, "tokens": tokens, "version": after["speculator_version"]})
                before = after
                print(f"{label} {start + len(block)}: accept {accept_length(found[-1:]):.2f} "
                      f"version {after['speculator_version']:.0f} train {after['speculator_train_s_total']:.1f} s",
                      flush=True)  # fmt: skip
        return found

    def wait_until_saved(self, path: Path) -> None:
        """Wait until the state has the head as it is now; without traffic it does not learn."""
        import torch

        end = time.monotonic() + 120
        while time.monotonic() < end:
            now, state = self.metrics(), torch.load(path, weights_only=True) if path.is_file() else None
            # The trainer tells its steps now and then, so the file may have a few more.
            steps = now["speculator_train_steps_total"]
            if state and state["version"] == now["speculator_version"] and state["num_steps"] >= steps:
                return
            time.sleep(2.0)
        raise SystemExit("the state was not saved")


COUNTS = ("drafts", "accepted_tokens")


def accept_length(blocks: list[dict[str, Any]]) -> float:
    """Tokens that a drafted step of a request yields; 1 where nothing was drafted."""
    return 1.0 + sum(b["accepted_tokens"] for b in blocks) / max(sum(b["drafts"] for b in blocks), 1.0)


def recovery(blocks: list[dict[str, Any]], plateau: float) -> int:
    """Return after how many requests a block reaches its share of the plateau; one more than all: never."""
    for i, block in enumerate(blocks):
        if accept_length([block]) >= PLATEAU * plateau:
            return (i + 1) * BLOCK
    return len(blocks) * BLOCK + 1


def last_quarter(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return blocks[-max(len(blocks) // 4, 1) :]


def questions_of(num_a: int, num_b: int, num_return: int, gsm8k: Path, seed: int) -> list[list[Question]]:
    """Return A, B and the A after it; no question comes twice."""
    from rl_accel.quickstart.problems import generate

    a = [("A", problem.question) for problem in generate(num_a + num_return, seed=1000 + seed, split="train")]
    with open(gsm8k / "train.jsonl", encoding="utf-8") as lines:
        texts = [json.loads(line)["question"] for line in lines]
    b = [("B", text) for text in texts if len(text) < 600][seed * num_b : (seed + 1) * num_b]
    return [a[:num_a], b, a[num_a:]]


def run(model: str, args: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """Return the curves of one seed. Raises AssertionError if the servers answer differently."""
    a, b, back = questions_of(args.a, args.b, args.back, args.gsm8k, seed)
    settings = [f"rl_accel.sampling.seed={seed}", f"rl_accel.speculator.seed={seed}"]
    state = folder / "online" / "engine000.pt"
    with Server(model, state.parent, *settings) as online:
        learned = {"A": online.serve(a, 0, f"seed {seed} online A")}
        online.wait_until_saved(state)
        (folder / "frozen").mkdir()
        shutil.copy(state, folder / "frozen")
        learned["B"] = online.serve(b, len(a), f"seed {seed} online B")
        learned["back"] = online.serve(back, len(a) + len(b), f"seed {seed} online A again")
    with Server(model, folder / "frozen", "rl_accel.speculator.learn=false", *settings) as frozen:
        kept = {
            "B": frozen.serve(b, len(a), f"seed {seed} frozen B"),
            "back": frozen.serve(back, len(a) + len(b), f"seed {seed} frozen A again"),
        }
    for part, blocks in kept.items():
        same = [x["tokens"] == y["tokens"] for x, y in zip(blocks, learned[part], strict=True)]
        assert all(same), f"seed {seed}: tokens of {part} differ in blocks {[i for i, s in enumerate(same) if not s]}"
    for blocks in [*learned.values(), *kept.values()]:
        for block in blocks:
            block["tokens"] = sum(map(len, block["tokens"]))
    return {"online": learned, "frozen": kept}


def rows_of(curves: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    found: dict[str, list[float]] = {}
    for result in curves.values():
        online, frozen = result["online"], result["frozen"]
        plateau_a, plateau_b = (accept_length(last_quarter(online[part])) for part in "AB")
        values = {
            "shift_gain": accept_length(online["B"]) / accept_length(frozen["B"]),
            "shift_gain.later": plateau_b / accept_length(last_quarter(frozen["B"])),
            "shift_recovery_requests": recovery(online["B"], plateau_b),
            "return_share": accept_length(online["back"][:1]) / plateau_a,
            "return_recovery_requests": recovery(online["back"], plateau_a),
            "return_gain": accept_length(online["back"]) / accept_length(frozen["back"]),
        }
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    units = {name: "requests" if name.endswith("requests") else "1" for name in found}
    incumbents = {"shift_gain": "frozen head", "shift_gain.later": "frozen head", "return_gain": "frozen head"}
    return [
        {
            "name": f"speculator.{name}",
            "value": round(statistics.median(values), 4),
            "unit": units[name],
            "incumbent": incumbents.get(name),
            "ratio": round(statistics.median(values), 4) if name in incumbents else None,
            "values": [round(value, 4) for value in values],
            "bound": None,
        }
        for name, values in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gsm8k", type=Path, required=True, help="folder with train.jsonl of GSM8K")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--a", type=int, default=640, help="requests of A")
    parser.add_argument("--b", type=int, default=384, help="requests of B")
    parser.add_argument("--back", type=int, default=128, help="requests of A after B")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    from rl_accel.machine import describe
    from rl_accel.quickstart.deep import POLICY, deep_policy

    model = str(POLICY if args.layers == 4 else deep_policy(args.layers))
    curves: dict[str, Any] = {}
    if args.json and args.json.is_file():
        curves = json.loads(args.json.read_text(encoding="utf-8"))["curves"]
    for seed in args.seeds:
        if str(seed) in curves:
            continue
        with tempfile.TemporaryDirectory() as folder:
            curves[str(seed)] = run(model, args, seed, Path(folder))
        rows = rows_of(curves)
        if args.json:
            options = {**vars(args), "gsm8k": args.gsm8k.name, "json": None, "seeds": sorted(map(int, curves))}
            content = {"machine": describe(), "options": options, "rows": rows, "curves": curves}
            args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for row in rows_of(curves):
        print(row)


if __name__ == "__main__":
    main()
