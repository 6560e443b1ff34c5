"""Time of the 4/8-bit codec against its bound, a copy of memory, and against the PyTorch specification.

    python scripts/bench_codec.py [--device cpu] [--mib 32] [--repeats 9] [--instructions auto] [--json FILE]

One process; on the CPU one core and the C++ backend, on CUDA the Triton backend. Each operation takes turns with

    specification   the same call in plain PyTorch (kernels/codec/reference.py)
    cast            `x.to(bfloat16)`: what is sent where nothing is quantized
    copy            memcpy on the CPU, `Tensor.copy_` on CUDA, of as many values: the bound

Bytes are those that an operation must read and write once: quantizing 4 bits of float32 reads 4 N and writes N / 2 and
the scales, adding a dequantized difference reads N / 2 + 4 N and writes 4 N, a copy of S bytes moves 2 S. `GB/s` rows
compare bytes per second with the copy's (`ratio` is the share of it), `ms` rows the time with the specification's;
their `bound` is the time the copy would take for the operation's bytes. Runs the tests of the backend first and stops
if they fail.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from rl_accel import machine
from rl_accel.hosts import versions
from rl_accel.kernels.codec import api as codec
from rl_accel.kernels.codec.layout import packed_bytes

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 2


@dataclass
class Operation:
    """A call by backend name, and the bytes that it must read and write."""

    name: str
    num_bytes: int
    call: Callable[[str], object]


class Workload:
    """Operations on N values of one device."""

    def __init__(self, numel: int, device: str):
        self.numel, self.device = numel, device
        generator = torch.Generator(device).manual_seed(0)
        self.x = torch.randn(numel, device=device, generator=generator)
        self.held = self.x + 1e-3 * torch.randn(numel, device=device, generator=generator)
        self.x_half, self.held_half = self.x.bfloat16(), self.held.bfloat16()
        self.out, self.out_half = torch.zeros_like(self.x), torch.zeros_like(self.x_half)

    def quantize(self, name: str, x: torch.Tensor, bits: int, group_size: int, **options) -> Operation:
        out = torch.empty(packed_bytes(self.numel, bits, group_size), dtype=torch.uint8, device=self.device)
        others = options.get("subtract")
        num_bytes = x.nbytes + out.nbytes + (0 if others is None else others.nbytes)
        return Operation(
            f"quantize {name}",
            num_bytes,
            lambda backend: codec.quantize(x, bits, group_size, out=out, backend=backend, **options),
        )

    def blocks(self, count: int, bits: int, group_size: int) -> torch.Tensor:
        return torch.stack([codec.quantize(self.x, bits, group_size) for _ in range(count)])

    def dequantize(self, name: str, count: int, bits: int, group_size: int, out: torch.Tensor, **options) -> Operation:
        blocks = self.blocks(count, bits, group_size)
        return Operation(
            f"dequantize {name}",
            blocks.nbytes + out.nbytes * (2 if options.get("add") else 1),
            lambda backend: codec.dequantize(blocks, self.numel, bits, group_size, out=out, backend=backend, **options),
        )

    def requantize(self, name: str, count: int, **options) -> Operation:
        blocks = self.blocks(count, 8, 512)
        out = torch.empty(packed_bytes(self.numel, 4, 128), dtype=torch.uint8, device=self.device)
        return Operation(
            f"requantize {name}",
            blocks.nbytes + out.nbytes,
            lambda backend: codec.requantize(blocks, self.numel, 8, 512, 4, 128, out=out, backend=backend, **options),
        )

    def operations(self) -> list[Operation]:
        stochastic, rotated = {"rounding": "stochastic"}, {"hadamard": True}
        return [
            self.quantize("4 bits, 128", self.x, 4, 128),
            self.quantize("4 bits, 2048", self.x, 4, 2048),
            self.quantize("8 bits, 512", self.x, 8, 512),
            self.quantize("4 bits, 128, stochastic", self.x, 4, 128, **stochastic),
            self.quantize("4 bits, 128, Hadamard", self.x, 4, 128, **rotated),
            self.quantize("4 bits, 128, Hadamard, stochastic", self.x, 4, 128, **rotated, **stochastic),
            self.quantize("8 bits, 512, bf16, Hadamard", self.x_half, 8, 512, **rotated),
            self.quantize("4 bits, 2048, difference", self.x, 4, 2048, subtract=self.held),
            self.quantize("4 bits, 2048, difference to bf16", self.x, 4, 2048, subtract=self.held_half),
            self.quantize("4 bits, 2048, bf16 difference", self.x_half, 4, 2048, subtract=self.held_half),
            self.dequantize("add, 4 bits, 128", 1, 4, 128, self.out, add=True),
            self.dequantize("add, 4 bits, 2048", 1, 4, 2048, self.out, add=True),
            self.dequantize("add to bf16, 4 bits, 2048", 1, 4, 2048, self.out_half, add=True),
            self.dequantize("4 bits, 128", 1, 4, 128, self.out),
            self.dequantize("8 bits, 512", 1, 8, 512, self.out),
            self.dequantize("sum of 2, 4 bits, 128, Hadamard", 2, 4, 128, self.out, **rotated),
            self.dequantize("sum of 4, 4 bits, 128, Hadamard", 4, 4, 128, self.out, **rotated),
            self.dequantize("sum of 4, 8 bits, 512, Hadamard", 4, 8, 512, self.out, **rotated),
            self.requantize("sum of 2", 2),
            self.requantize("sum of 4", 4),
            self.requantize("sum of 4, stochastic", 4, **stochastic),
        ]

    def copy(self) -> Callable[[], object]:
        if self.device == "cuda":
            return lambda: self.out.copy_(self.x)
        memcpy = ctypes.CDLL(None).memcpy
        memcpy.argtypes, memcpy.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], ctypes.c_void_p
        return lambda: memcpy(self.out.data_ptr(), self.x.data_ptr(), self.x.nbytes)


def measure(arms: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, torch.Tensor]:
    """Seconds of every repeat by name; the arms take turns, after two warm-up rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(-WARM_UP, repeats):
        for name, call in arms.items():
            synchronize(device)
            started = time.perf_counter()
            call()
            synchronize(device)
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - started)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in seconds.items()}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def bench(operation: Operation, data: Workload, ours: str, repeats: int) -> list[dict]:
    copy = data.copy()
    arms: dict[str, Callable[[], object]] = {
        ours: lambda: operation.call(ours),
        "copy": copy,
        "cast": lambda: data.out_half.copy_(data.x),
        "specification": lambda: operation.call("torch"),
    }
    seconds = measure(arms, repeats, data.device)
    p50 = {name: float(values.median()) for name, values in seconds.items()}
    p95 = {name: float(values.quantile(0.95)) for name, values in seconds.items()}
    rate, copy_rate = operation.num_bytes / p50[ours] / 1e9, 2 * data.x.nbytes / p50["copy"] / 1e9
    bound = operation.num_bytes / copy_rate / 1e6
    print(
        f"{operation.name:<45} p50 {p50[ours] * 1e3:8.3f} ms  p95 {p95[ours] * 1e3:8.3f} ms  bound {bound:7.3f} ms  "
        f"{rate:8.2f} GB/s = {rate / copy_rate:4.0%} of a copy's {copy_rate:8.2f}  "
        f"specification {p50['specification'] * 1e3:8.2f} ms  cast {p50['cast'] * 1e3:7.3f} ms"
    )
    name = f"codec.{data.device}.{operation.name}"
    rows = [row(f"{name}, GB/s", rate, "GB/s", copy_rate, rate / copy_rate, copy_rate)]
    for label, found in (("p50", p50), ("p95", p95)):
        theirs = found["specification"]
        rows.append(row(f"{name}, {label}", found[ours] * 1e3, "ms", theirs * 1e3, theirs / found[ours], bound))
    theirs = p50["cast"]
    return [*rows, row(f"{name}, against a bf16 cast", p50[ours] * 1e3, "ms", theirs * 1e3, theirs / p50[ours], bound)]


def row(name: str, value: float, unit: str, incumbent: float, ratio: float, bound: float | None) -> dict:
    return {"name": name, "value": value, "unit": unit, "incumbent": incumbent, "ratio": ratio, "bound": bound}


def per_call(ours: str, device: str) -> dict:
    """Microseconds of a call on 32 values, where nothing but the call costs."""
    x = torch.ones(32, device=device)
    out = torch.empty(packed_bytes(32, 4, 32), dtype=torch.uint8, device=device)
    times = {}
    for name in (ours, "torch"):
        args = (out, x, None, 4, 32, False, 0, 0, False)
        call, found = codec.load_backend(name, device).quantize, []
        for _ in range(9):
            synchronize(device)
            started = time.perf_counter()
            for _ in range(500):
                call(*args)
            synchronize(device)
            found.append((time.perf_counter() - started) / 500 * 1e6)
        times[name] = sorted(found)[4]
    print(f"a call on 32 values: {times[ours]:.2f} us, specification {times['torch']:.1f} us")
    return row(
        f"codec.{device}.call on 32 values", times[ours], "us", times["torch"], times["torch"] / times[ours], None
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--mib", type=int, help="float32 values of an operation; 32 on the CPU, 512 on CUDA")
    parser.add_argument("--repeats", type=int, default=9, help="at least 5")
    parser.add_argument("--instructions", default="auto", help="auto, scalar, avx2 or avx512")
    parser.add_argument("--json", type=Path, help="write the results as a list of {name, value, unit, ...}")
    options = parser.parse_args()
    if options.repeats < 5:
        parser.error("--repeats must be at least 5")
    ours = "triton" if options.device == "cuda" else "cpp"
    tests = ["tests/comm/test_codec.py", f"tests/kernels/test_codec_{ours}.py"]
    subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=ROOT, check=True)
    conditions = {"command": " ".join(sys.argv), "machine": machine.describe(), "versions": versions.report()}
    conditions["load"] = os.getloadavg()[0]  # of this and all other processes; the tests above count
    if ours == "cpp":
        from rl_accel.kernels.codec import _codec

        _codec.set_instructions(options.instructions)
        torch.set_num_threads(1)
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        conditions |= {"instructions": _codec.instructions(), "cores_used": 1}
    print(conditions)
    data = Workload((options.mib or (32 if ours == "cpp" else 512)) << 18, options.device)
    rows = [found for operation in data.operations() for found in bench(operation, data, ours, options.repeats)]
    rows.append(per_call(ours, options.device))
    if options.json:
        rows.append({"name": f"codec.{options.device}.conditions", "value": None, **conditions})
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
