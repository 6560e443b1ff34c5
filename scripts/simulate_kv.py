"""What a quantized KV cache would give on an H100 or H200: a model by bytes, not a measurement.

    python scripts/simulate_kv.py [--gpu h100 h200] [--model 0.5b 7b 8b 32b] [--context 1024 8192 32768]
        [--share 0.75] [--kv-share 0.35] [--utilization 0.9] [--reserve-gb 4] [--bench FILE] [--json FILE]

A decoding step reads all weights once and K and V of every request once, so its time is at least these bytes over the
memory's bandwidth. `--share` says how much of the bandwidth bfloat16 and fp8 reach, `--kv-share` how much reading 4-bit
pages reaches: nobody has measured it, and the kernel's instructions allow 0.26 to 0.50 (`kernels/kv_int4/TRITON.md`).
Break-even is the kv-share below which a step with as many requests takes longer than with bfloat16. Requests are those
that fit beside weights and a reserve, each of the full context in blocks of 16 tokens. Left out: arithmetic, which
binds before thousands of requests do; launches, prompts, activations beyond the reserve, several GPUs.

    kv_sim.<gpu>.<model>.<context>.<format>.requests         that fit
    kv_sim.<gpu>.<model>.<context>.<format>.step_ms          with as many requests as fit with bfloat16
    kv_sim.<gpu>.<model>.<context>.<format>.tokens_per_s     with as many as fit with the format

`incumbent` is bfloat16, `bound` the time at the full bandwidth. `--bench` checks the method on the CPU's figures
(`bench_kv_int4.py --json`): the time of each call from the bytes of another context with the same heads, against what
was measured.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from rl_accel.kernels.kv_int4.layout import PageLayout

BLOCK = 16


@dataclass(frozen=True)
class Gpu:
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes a second."""


@dataclass(frozen=True)
class Model:
    """Shape of a policy whose weights are bfloat16."""

    parameters: float
    num_layers: int
    num_kv_heads: int
    head_size: int


GPUS = {"h100": Gpu(80e9, 3.35e12), "h200": Gpu(141e9, 4.8e12)}
"""SXM, by NVIDIA's data sheets."""
MODELS = {
    "0.5b": Model(0.494e9, 24, 2, 64),
    "7b": Model(7.62e9, 28, 4, 128),
    "8b": Model(8.03e9, 32, 8, 128),
    "32b": Model(32.8e9, 64, 8, 128),
}
"""Qwen2.5-0.5B and 7B, Llama-3.1-8B, Qwen2.5-32B."""
FORMATS = ("bf16", "fp8", "vllm_int4", "int4", "int4_int8")
"""vllm_int4: `int4_per_token_head`; int4: ours; int4_int8: ours with the first layer in 8 bits."""


def token_bytes(model: Model, kind: str) -> int:
    """Return the bytes of K and V of a token in all layers."""
    size = model.head_size
    by_layer = {"bf16": 4 * size, "fp8": 2 * size, "vllm_int4": size + 8}.get(
        kind, PageLayout(BLOCK, size, 4).token_bytes
    )
    extra = PageLayout(BLOCK, size, 8).token_bytes - by_layer if kind == "int4_int8" else 0
    return model.num_kv_heads * (model.num_layers * by_layer + extra)


def fitting_requests(gpu: Gpu, model: Model, kind: str, context: int, utilization: float, reserve: float) -> int:
    """Return how many requests of `context` tokens fit beside the weights."""
    free = gpu.memory * utilization - 2 * model.parameters - reserve
    return max(0, int(free // (token_bytes(model, kind) * math.ceil(context / BLOCK) * BLOCK)))


def step_seconds(
    gpu: Gpu, model: Model, kind: str, context: int, requests: int, share: float, kv_share: float
) -> float:
    """Return the time of a step that decodes a token of each request."""
    kv_bytes = requests * context * token_bytes(model, kind)
    kv_share = share if kind in ("bf16", "fp8") else kv_share
    return 2 * model.parameters / (share * gpu.bandwidth) + kv_bytes / (kv_share * gpu.bandwidth)


def simulate(options: argparse.Namespace) -> list[dict]:
    rows: list[dict] = []
    for gpu_name, model_name, context in product(options.gpu, options.model, options.context):
        gpu, model = GPUS[gpu_name], MODELS[model_name]
        fits = [
            fitting_requests(gpu, model, kind, context, options.utilization, options.reserve_gb * 1e9)
            for kind in FORMATS
        ]
        if not fits[0]:
            continue
        for kind, requests in zip(FORMATS, fits, strict=True):
            point = gpu, model, kind, context
            step = step_seconds(*point, fits[0], options.share, options.kv_share)
            rate = requests / step_seconds(*point, requests, options.share, options.kv_share)
            for what, value, unit, bound in (
                ("requests", requests, "requests", None),
                ("step_ms", 1e3 * step, "ms", 1e3 * step_seconds(*point, fits[0], 1.0, 1.0)),
                ("tokens_per_s", rate, "tokens/s", requests / step_seconds(*point, requests, 1.0, 1.0)),
            ):
                name = f"kv_sim.{gpu_name}.{model_name}.{context}.{kind}.{what}"
                first = value if kind == "bf16" else rows[-3 * FORMATS.index(kind)]["value"]
                ratio = first / value if what == "step_ms" else value / first
                rows.append(
                    {"name": name, "value": value, "unit": unit, "incumbent": first, "ratio": ratio, "bound": bound}
                )
    return rows


def predictions(bench_rows: list[dict]) -> list[tuple[str, float, float]]:
    """Return of every decoding call but the first of its heads: name, predicted and measured time.

    A call reads at the share of the bandwidth that the call before it, of the same heads and another context, did. Of
    both arms: ours, and vLLM's (`stock`), whose bytes follow from the head size.
    """
    found, shares = [], {}
    for row in bench_rows:
        if not (match := re.match(r"kv\.decode_us\.d(\d+)\.(g\d+)\.(\d+)\.(\w+)$", row["name"])):
            continue
        size, groups, _, instructions = match.groups()
        ratio = 4 * int(size) / PageLayout(BLOCK, int(size), 4).token_bytes
        for arm, measured, bound in (
            (instructions, row["value"], row["bound"]),
            ("stock", row["incumbent"], row["bound"] * ratio),
        ):
            key = size, groups, instructions, arm
            if key in shares:
                found.append((f"{row['name']} ({arm})", bound / shares[key], measured))
            shares[key] = bound / measured
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", nargs="*", choices=GPUS, default=list(GPUS))
    parser.add_argument("--model", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--context", nargs="*", type=int, default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--share", type=float, default=0.75, help="of the bandwidth, reading weights and bf16 or fp8")
    parser.add_argument("--kv-share", type=float, default=0.35, help="of the bandwidth, reading 4-bit pages")
    parser.add_argument("--utilization", type=float, default=0.9, help="vLLM's gpu_memory_utilization")
    parser.add_argument("--reserve-gb", type=float, default=4.0, help="activations, graphs and workspaces, 10^9 bytes")
    parser.add_argument("--bench", type=Path, help="results of bench_kv_int4.py to check the method on")
    parser.add_argument("--json", type=Path, help="write the results as a list of {name, value, unit, ...}")
    options = parser.parse_args()
    rows = simulate(options)
    for row in rows:
        print(
            f"{row['name']:<50} {row['value']:12.2f} {row['unit']:<9} bf16 {row['incumbent']:12.2f} {row['ratio']:.2f}x"
        )
    for name in options.model:
        ratio = token_bytes(MODELS[name], "bf16") / token_bytes(MODELS[name], "int4_int8")
        print(f"{name}: {ratio:.2f} times the tokens; break-even at a kv-share of {options.share / ratio:.2f}")
    if options.bench:
        for name, predicted, measured in predictions(json.loads(options.bench.read_text())):
            print(f"{name:<50} predicted {predicted:9.1f} us, measured {measured:9.1f}, {predicted / measured:5.2f}")
    if options.json:
        conditions = {key: value for key, value in vars(options).items() if key not in ("json", "bench")}
        rows.append({"name": "kv_sim.conditions", "value": None, "model": "bytes over bandwidth", **conditions})
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
