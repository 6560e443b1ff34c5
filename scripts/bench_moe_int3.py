"""Time of quantized expert layers on the CPU against vLLM's own kernel over bfloat16 and float32 weights.

    python scripts/bench_moe_int3.py [--part quantize decode bits] [--shape 2048x768x32 2048x1536x16] [--top-k 8]
        [--batch 1 2 8 32 128] [--bits 2 3 4] [--rank 0 16 32] [--threads 1 2] [--rounds 5] [--instructions auto]
        [--json FILE]

A shape is hidden x intermediate x experts. One process; arms take turns by rounds, a round gives the median of calls
with other tokens and experts each, and a figure is the median of the rounds; with one
thread its CPU time is taken. `spread` is what lies between the fastest and the slowest round, as a share of the median.
Tokens are bfloat16. Codes, scales and factors are random: time does not depend on them. Materialized weights have no
rows, for they run through the incumbent's kernel.

    moe.quantize_ns.<bits>                                     a weight, 10 iterations, one thread, its CPU time
    moe.decode_us.b<batch>.<shape>.w<bits>.r<rank>.t<threads>.<bf16|fp32>
                                                               a layer; the incumbent has weights of that type
    moe.bits.<shape>.w<bits>.r<rank>                           a weight, all in; the incumbent is bfloat16

`bound` of a layer is the time to read the bytes of the experts that its tokens ask for, at the bandwidth of a sum over
memory measured here. Runs the tests of the kernels first and stops if they fail.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from rl_accel import machine
from rl_accel.hosts import versions
from rl_accel.kernels.moe_int3 import cpp
from rl_accel.kernels.moe_int3.layout import FACTOR_BITS, LANES, Factors, QuantizedMatrix, num_blocks

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("tests/kernels/test_moe_int3.py", "tests/kernels/test_moe_int3_cpp.py")
GROUP_SIZE = 64
ITERATIONS = 10
CALLS = 3
"""Different tokens of a round; one call where they ask for every expert anyway."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    num_experts: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        return cls(*map(int, text.split("x")))

    @property
    def weights(self) -> int:
        """Of one expert."""
        return 3 * self.hidden * self.intermediate

    def __str__(self) -> str:
        return f"{self.hidden}x{self.intermediate}x{self.num_experts}"


@dataclass(frozen=True)
class Packed:
    """An expert layer of random codes."""

    w13: QuantizedMatrix
    w13_factors: Factors | None
    w2: QuantizedMatrix
    w2_factors: Factors | None

    @classmethod
    def make(cls, shape: Shape, bits: int, rank: int) -> Packed:
        w13 = random_matrix(shape.num_experts, 2 * shape.intermediate, shape.hidden, bits)
        w2 = random_matrix(shape.num_experts, shape.hidden, shape.intermediate, bits)
        return cls(w13, random_factors(w13, rank), w2, random_factors(w2, rank))

    def memory_bytes(self) -> int:
        return sum(part.memory_bytes() for part in (self.w13, self.w13_factors, self.w2, self.w2_factors) if part)

    def __call__(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return cpp.experts(x, weights, ids, self.w13, self.w13_factors, self.w2, self.w2_factors)


def random_matrix(num_matrices: int, rows: int, length: int, bits: int) -> QuantizedMatrix:
    codes = torch.randint(256, (num_matrices, rows, num_blocks(length) * LANES * bits), dtype=torch.uint8)
    scales, offsets = (torch.rand(2, num_matrices, rows, length // GROUP_SIZE) * 0.01).half()
    return QuantizedMatrix(codes, scales, -offsets, bits, GROUP_SIZE, length)


def random_factors(of: QuantizedMatrix, rank: int) -> Factors | None:
    def rows(length: int) -> tuple[torch.Tensor, torch.Tensor]:
        blocks, total = num_blocks(length), rank * of.num_matrices
        codes = torch.randint(256, (total, blocks * LANES * FACTOR_BITS), dtype=torch.uint8)
        return codes, torch.rand(total, blocks).half() * 0.01

    starts = torch.arange(of.num_matrices + 1, dtype=torch.int32) * rank
    return Factors(*rows(of.in_features), *rows(of.out_features), starts) if rank else None


def stock(shape: Shape, dtype: torch.dtype) -> Layer:
    """Return vLLM's kernel with weights as its method for unquantized experts prepacks them."""
    from vllm import _custom_ops as ops

    def weights(rows: int, length: int) -> torch.Tensor:
        return ops.cpu_prepack_moe_weight((torch.randn(shape.num_experts, rows, length) * 0.02).to(dtype), "vec")

    w13, w2 = weights(2 * shape.intermediate, shape.hidden), weights(shape.hidden, shape.intermediate)
    return lambda x, scores, ids: ops.cpu_fused_moe(
        x.to(dtype), w13, w2, None, None, scores, ids, "silu", "vec", False
    )  # fmt: skip


def clock() -> float:
    """Seconds: of the calling thread where it is the only one, so that other programs count little; else wall time."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def measure(arms: dict[str, Callable[..., object]], inputs: list[tuple], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of a call by arm and round: medians of its calls. A first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(-1, rounds):
        for name, call in arms.items():
            found = []
            for args in inputs:
                started = clock()
                call(*args)
                found.append(clock() - started)
            if number >= 0:
                seconds[name].append(median(found))
    return seconds


def read_bandwidth(rounds: int = 9) -> float:
    """Bytes a second of a sum over memory, the best round."""
    data, best = torch.zeros(64 << 18), 0.0
    for _ in range(rounds):
        started = clock()
        data.sum()
        best = max(best, data.nbytes / (clock() - started))
    return best


def row(
    name: str, value: float, unit: str, incumbent: float | None, bound: float | None = None, spread: float | None = None
) -> dict:
    ratio = None if incumbent is None else incumbent / value
    against = "" if incumbent is None else f"  stock {incumbent:10.2f}  {ratio:5.2f}x"
    limit = "" if bound is None else f"  bound {bound:9.2f}"
    print(f"{name:<54} {value:10.2f} {unit:<4}{against}{limit}", flush=True)
    return {
        "name": name, "value": value, "unit": unit, "incumbent": incumbent, "ratio": ratio, "bound": bound,
        "spread": spread,
    }  # fmt: skip


def spread_of(seconds: list[float]) -> float:
    return (max(seconds) - min(seconds)) / median(seconds)


def quantize_rows(options: argparse.Namespace, bandwidth: float) -> Iterator[dict]:
    w = torch.randn(4, 1024, 1024)
    torch.set_num_threads(1)
    arms = {
        str(bits): lambda w, bits=bits: cpp.quantize(w, bits, GROUP_SIZE, ITERATIONS) for bits in options.bits
    }  # fmt: skip
    for bits, seconds in measure(arms, [(w,)], options.rounds).items():
        found = median(seconds) / w.numel() * 1e9
        yield row(f"moe.quantize_ns.{bits}", found, "ns", None, 4e9 / bandwidth, spread_of(seconds))


def bits_rows(options: argparse.Namespace, bandwidth: float) -> Iterator[dict]:
    for shape in options.shape:
        for bits in options.bits:
            for rank in options.rank:
                total = Packed.make(shape, bits, rank).memory_bytes() * 8
                name = f"moe.bits.{shape}.w{bits}.r{rank}"
                yield row(name, total / shape.weights / shape.num_experts, "bits", 16.0)


def decode_rows(options: argparse.Namespace, bandwidth: float) -> Iterator[dict]:
    for shape in options.shape:
        arms: dict[str, Layer] = {name: stock(shape, dtype) for name, dtype in DTYPES.items()}
        packed = {f"w{b}.r{r}": Packed.make(shape, b, r) for b in options.bits for r in options.rank}
        arms |= packed
        for batch in options.batch:
            inputs = [
                (torch.randn(batch, shape.hidden).bfloat16(), torch.rand(batch, options.top_k),
                 torch.rand(batch, shape.num_experts).topk(options.top_k).indices.int())
                for _ in range(CALLS if batch < 128 else 1)
            ]  # fmt: skip
            used = median(len(ids.unique()) for _, _, ids in inputs)
            for threads in options.threads:
                torch.set_num_threads(threads)
                times = measure(arms, inputs, options.rounds)
                for label, layer in packed.items():
                    bound = layer.memory_bytes() * used / shape.num_experts / bandwidth * 1e6
                    for dtype in DTYPES:
                        name = f"moe.decode_us.b{batch}.{shape}.{label}.t{threads}.{dtype}"
                        value, incumbent = median(times[label]) * 1e6, median(times[dtype]) * 1e6
                        yield row(name, value, "us", incumbent, bound, spread_of(times[label]))


PARTS = {"quantize": quantize_rows, "bits": bits_rows, "decode": decode_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shape", nargs="*", type=Shape.parse, default=[Shape(2048, 768, 32), Shape(2048, 1536, 16)])
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 2, 8, 32, 128])
    parser.add_argument("--bits", nargs="*", type=int, default=[2, 3, 4])
    parser.add_argument("--rank", nargs="*", type=int, default=[0, 16, 32])
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5, help="at least 5")
    parser.add_argument("--instructions", default="auto", help="scalar, avx2 or avx512; auto: the widest that is here")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--json", type=Path, help="write the results as a list of {name, value, unit, ...}")
    options = parser.parse_args()
    if options.rounds < 5:
        parser.error("--rounds must be at least 5")
    if not options.no_tests:
        subprocess.run([sys.executable, "-m", "pytest", "-q", *TESTS], cwd=ROOT, check=True)
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    cpp.set_instructions(options.instructions)
    torch.set_num_threads(max(options.threads))
    torch.manual_seed(0)
    bandwidth = read_bandwidth()
    conditions = {
        "command": " ".join(sys.argv), "machine": machine.describe(), "versions": versions.report(),
        "load": [os.getloadavg()[0]], "threads": options.threads, "instructions": cpp.instructions(),
        "incumbent": "vLLM's cpu_fused_moe, vec", "read_GB/s": bandwidth / 1e9,
    }  # fmt: skip
    print(conditions)
    rows = [found for part in options.part for found in PARTS[part](options, bandwidth)]
    conditions["load"].append(os.getloadavg()[0])
    if options.json:
        rows.append({"name": "moe.conditions", "value": None, **conditions})
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
