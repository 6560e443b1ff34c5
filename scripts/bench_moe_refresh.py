"""What a cold refresh of low-bit experts takes on a CPU, a model of it that is checked here, what that says of a GPU.

    python scripts/bench_moe_refresh.py [--shape 1536x2048 768x2048 512x128] [--rank 16 32] [--alternations 4]
        [--rounds 5] [--run FOLDER] [--json FILE]

The model counts what `rl_accel.moe.compress` does to a matrix of N x K: passes of the quantizer, FLOPs of products with
rank-r factors, bytes of everything else. Each is divided by a rate measured here beside it: nanoseconds a weight of the
quantizer, FLOP/s of such a product, bytes/s of a difference of two matrices. On a GPU the rates are peaks and counts of
instructions (kernels/moe_int3/TRITON.md), so those rows are predictions.

    moe.refresh_ns.<shape>.r<rank>           a weight; `predicted` beside it, `ratio` is predicted over measured
    moe.refresh_s.30b.r<rank>.h200           predicted: 30 billion weights of experts of 1,536 x 2,048
    moe.refresh_share                        median over the steps of a finished run (`--run`), of a step

One thread, its CPU time; 3 bits, groups of 64; shapes take turns by rounds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from rl_accel import machine
from rl_accel.hosts import versions
from rl_accel.kernels.moe_int3 import cpp
from rl_accel.moe.bases import BASES
from rl_accel.moe.compress import Method, compress
from rl_accel.moe.low_rank import EXACT_MAX_DIM, OVERSAMPLING, POWER_STEPS

BITS, GROUP_SIZE, MATRICES = 3, 64, 4
EIGH_FLOPS = 9
"""Times n^3, of all eigenvectors of a symmetric matrix (Golub and Van Loan, 8.3)."""
H200 = {"bytes_s": 4.8e12, "flops_s": 40e12, "quantize_ns": 0.39 / 30}
"""HBM3e; float32 at 60 % of peak; the quantizer by instructions, 10 iterations (TRITON.md)."""


@dataclass(frozen=True)
class Work:
    """Of one matrix."""

    quantized: float
    """Weights through the base quantizer."""
    products: float
    """FLOPs of products with thin factors."""
    eigh: float
    """FLOPs of decompositions."""
    bytes: float

    def seconds(self, quantize_ns: float, flops_s: float, bytes_s: float, eigh_s: float) -> float:
        return (
            1e-9 * quantize_ns * self.quantized
            + self.products / flops_s
            + self.eigh / eigh_s
            + self.bytes / bytes_s
        )  # fmt: skip


def work(rows: int, columns: int, rank: int, alternations: int) -> Work:
    """Count what a cold refresh does to one matrix.

    The first alternation decomposes what codes leave, the others go on from the factors before. Passes over the matrix
    in float32, read or written: difference to the codes 4 (dequantized, read twice, written), residual after the
    factors 2, its norm 1, target of the next codes 2; products read it once each, which their rate includes. At the end
    rows are scaled: two dequantizations, three differences and products by rows.
    """
    size, smaller = rows * columns, min(rows, columns)
    exact = smaller <= EXACT_MAX_DIM
    width = smaller if exact else min(rank + OVERSAMPLING, smaller)
    first_products = 2 * size * (smaller if exact else (2 * POWER_STEPS + 1) * width) + 2 * size * rank * 3
    next_products = 2 * size * rank * 6
    products = first_products + (alternations - 1) * next_products + 2 * size * rank
    passes = alternations * 9 + 15
    return Work(alternations * size, products, EIGH_FLOPS * smaller**3 if exact else 0.0, 4.0 * size * passes)


def clocked(call: Callable[[], object]) -> float:
    started = time.thread_time()
    call()
    return time.thread_time() - started


def rates(w_ENK: torch.Tensor, rank: int) -> dict[str, float]:
    """Measure each rate once on a stack of matrices."""
    factor, other = torch.randn(w_ENK.shape[2], rank), torch.randn_like(w_ENK)
    smaller = torch.randn(min(w_ENK.shape[1:]), min(w_ENK.shape[1:]))
    smaller = smaller @ smaller.T
    found = {
        "quantize_ns": clocked(lambda: BASES["ls"](w_ENK, BITS, GROUP_SIZE)) * 1e9 / w_ENK.numel(),
        "flops_s": 2 * w_ENK.numel() * rank / clocked(lambda: [w @ factor for w in w_ENK]),
        "bytes_s": 12 * w_ENK.numel() / clocked(lambda: w_ENK - other),
        "eigh_s": 1.0,
    }
    if len(smaller) <= EXACT_MAX_DIM:
        found["eigh_s"] = EIGH_FLOPS * len(smaller) ** 3 / clocked(lambda: torch.linalg.eigh(smaller))
    return found


def measure(shapes: list[tuple[int, int]], ranks: list[int], alternations: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each shape and rank."""
    seconds: dict[tuple, list[float]] = {}
    predicted: dict[tuple, list[float]] = {}
    for number in range(rounds + 1):  # the first warms up
        for shape in shapes:
            w_ENK = torch.randn(MATRICES, *shape, generator=torch.Generator().manual_seed(number))
            for rank in ranks:
                method = Method(alternations=alternations)
                took = clocked(
                    lambda w=w_ENK, rank=rank, method=method: compress(w, BITS, GROUP_SIZE, [rank] * MATRICES, method)
                )
                model = work(*shape, rank, alternations).seconds(**rates(w_ENK, rank))
                if number:
                    seconds.setdefault((shape, rank), []).append(1e9 * took / w_ENK.numel())
                    predicted.setdefault((shape, rank), []).append(1e9 * model / (shape[0] * shape[1]))
    rows = []
    for ((n, k), rank), times in seconds.items():
        ratios = [a / b for a, b in zip(predicted[(n, k), rank], times, strict=True)]
        rows.append(
            {
                "name": f"moe.refresh_ns.{n}x{k}.r{rank}", "value": median(times), "unit": "ns",
                "predicted": median(predicted[(n, k), rank]), "ratio": median(ratios), "incumbent": None, "bound": None,
                "spread": (max(times) - min(times)) / median(times),
            }
        )  # fmt: skip
    return rows


def prediction(rank: int, alternations: int, weights: float = 30e9) -> dict[str, Any]:
    shape = (1536, 2048)
    seconds = work(*shape, rank, alternations).seconds(eigh_s=1.0, **H200) * weights / (shape[0] * shape[1])
    return {
        "name": f"moe.refresh_s.30b.r{rank}.h200", "value": seconds, "unit": "s", "predicted": True,
        "alternations": alternations, "incumbent": None, "bound": None,
    }  # fmt: skip


def share(folder: Path) -> dict[str, Any]:
    """The row of a finished run."""
    steps = [json.loads(line)["data"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shares = [step["rl_accel/moe/refresh_share"] for step in steps if step.get("rl_accel/moe/refresh_share")]
    return {
        "name": "moe.refresh_share", "value": median(shares), "unit": "1", "incumbent": None, "bound": 0.1,
        "steps": len(shares), "max": max(shares),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="*", default=["1536x2048", "768x2048", "512x128"])
    parser.add_argument("--rank", nargs="*", type=int, default=[16, 32])
    parser.add_argument("--alternations", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--run", type=Path, help="folder of a finished run with low-bit experts")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    shapes = [tuple(map(int, text.split("x"))) for text in args.shape]
    rows = measure(shapes, args.rank, args.alternations, args.rounds)
    rows += [prediction(rank, args.alternations) for rank in args.rank]
    rows += [share(args.run)] if args.run else []
    for row in rows:
        print(f"{row['name']:40} {row['value']:9.3f} {row['unit']:3} {row.get('ratio', '')}")
    if args.json:
        conditions = {"name": "moe.refresh_conditions", "machine": machine.describe(), "versions": versions.report()}
        conditions |= {"instructions": cpp.instructions(), "command": "scripts/bench_moe_refresh.py"}
        args.json.write_text(json.dumps([*rows, conditions], indent=1) + "\n")


if __name__ == "__main__":
    main()
