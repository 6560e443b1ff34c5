"""Time of expert layers with packed weights on CUDA against vLLM's bfloat16 experts and its LoRA hook; of a refresh.

    python scripts/bench_moe_int3_gpu.py [--batch 1 8 32 128 512] [--bits 3] [--rank 0 16 32] [--experts 128]
        [--top-k 8] [--hidden 2048] [--intermediate 768] [--layers 4] [--rounds 9] [--no-tests] [--json FILE]

Layers of Qwen3-30B-A3B's shape, bfloat16, groups of 64, random routing. One process, arms take turns over layers that
together are larger than the L2 cache, a figure is the median of the rounds. `bound` is the time to read our packed
bytes of the experts that have tokens, at the bandwidth of a sum over memory measured here. Runs the tests of the
kernels first and stops if they fail, or if an arm's results are others than ours. Nobody has run this on a GPU.

    moe_gpu.decode_us.b<batch>.r<rank>.bf16     ours; incumbent: vLLM's TritonExperts, bfloat16, both as CUDA graphs
    moe_gpu.decode_us.b<batch>.r<rank>.lora     ours; incumbent: the same with compensators through its LoRA hook, which
                                                reads a flag on the host: both without graphs
    moe_gpu.refresh_ns.<bits>                   quantizing a weight, 5 iterations; incumbent: copying it

Humming is not timed: its version is checked, and what is missing printed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch

from rl_accel.kernels.moe_int3.layout import Factors, QuantizedMatrix

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("tests/kernels/test_moe_int3_triton.py", "tests/moe/test_lora_hook.py", "tests/moe/test_humming.py")
GROUP, ITERATIONS = 64, 5
DTYPE = torch.bfloat16
Call = Callable[[], object]


class Layer:
    """Weights of one layer, quantized, with compensators of one rank for all experts."""

    def __init__(self, options: argparse.Namespace, rank: int, seed: int):
        from rl_accel.kernels.moe_int3 import triton as kernels
        from rl_accel.kernels.moe_int3.triton_planes import to_planes

        generator = torch.Generator("cuda").manual_seed(seed)
        num_experts, hidden, inner = options.experts, options.hidden, options.intermediate

        def matrix(rows: int, length: int) -> tuple[QuantizedMatrix, Factors | None]:
            w = torch.randn(num_experts, rows, length, generator=generator, device="cuda") * length**-0.5
            factors = None
            if rank:
                v, u = (
                    kernels.quantize_factor(
                        torch.randn(num_experts * rank, size, generator=generator, device="cuda") * 0.1, 3
                    )
                    for size in (length, rows)
                )
                starts = torch.arange(num_experts + 1, dtype=torch.int32, device="cuda") * rank
                factors = Factors(*v, *u, starts)
            return kernels.quantize(w, options.bits, GROUP, ITERATIONS), factors

        self.w13, self.f13 = matrix(2 * inner, hidden)
        self.w2, self.f2 = matrix(hidden, inner)
        self.planes = to_planes(self.w13, self.f13), to_planes(self.w2, self.f2)
        self.dense = kernels.dequantize(self.w13).to(DTYPE), kernels.dequantize(self.w2).to(DTYPE)
        self.bytes_per_expert = sum(x.memory_bytes() for x in self.planes) / num_experts


class Step:
    """A batch of tokens and their experts."""

    def __init__(self, options: argparse.Namespace, batch: int):
        self.x = torch.randn(batch, options.hidden, device="cuda").to(DTYPE)
        scores = torch.rand(batch, options.experts, device="cuda")
        weights, ids = scores.topk(options.top_k)
        self.weights, self.ids = weights / weights.sum(-1, keepdim=True), ids.int()
        self.num_experts = len(self.ids.unique())

    def ours(self, layers: list[Layer]) -> Call:
        from rl_accel.kernels.moe_int3 import triton as kernels

        def call() -> torch.Tensor:
            for layer in layers:
                w13, w2 = layer.planes
                out = kernels.experts(self.x, self.weights, self.ids, w13, None, w2, None)
            return out

        return call

    def vllm(self, layers: list[Layer], options: argparse.Namespace, lora: bool) -> Call:
        """Arm of vLLM's experts; with `lora`, compensators as an adapter that every token uses."""
        from rl_accel.moe.hosts import lora_hook

        experts = []
        wrapper = lora_hook.always_on(len(self.x), "cuda") if lora else None
        for layer in layers:
            one = lora_hook.triton_experts(
                options.experts, options.top_k, options.hidden, options.intermediate, DTYPE, "cuda"
            )
            if lora:
                tensors = lora_hook.lora_tensors(layer.w13, layer.f13, layer.w2, layer.f2, DTYPE)
                one.set_lora_context(lora_hook.lora_context(tensors, options.top_k, wrapper))
            experts.append(one)

        def call() -> torch.Tensor:
            for layer, one in zip(layers, experts, strict=True):
                out = lora_hook.apply(one, self.x, *layer.dense, self.weights, self.ids)
            return out

        return call


def check_same(ours: torch.Tensor, other: torch.Tensor) -> None:
    """Weights were rounded to bfloat16 there, and activations twice."""
    difference = float((ours.float() - other.float()).norm() / other.float().norm())
    if not difference < 2e-2:
        sys.exit(f"bench_moe_int3_gpu: an arm computes something else: relative difference {difference:.3g}")


def captured(call: Call) -> Call:
    """The call as a CUDA graph, as an engine replays a decoding step."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Median seconds of a call of each, in turn, after two rounds of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-2, rounds):
        for name, call in calls.items():
            torch.cuda.synchronize()
            started = time.perf_counter()
            call()
            torch.cuda.synchronize()
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
    return {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 8, 32, 128, 512])
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--rank", nargs="*", type=int, default=[0, 16, 32], help="of compensators; 0: none")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--json", type=Path, help="write the results as a list of {name, value, unit, ...}")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_moe_int3_gpu: no GPU here; scripts/bench_moe_int3.py times the CPU")
    if not options.no_tests:
        subprocess.run([sys.executable, "-m", "pytest", "-q", *TESTS], cwd=ROOT, check=True)
    from rl_accel.kernels.moe_int3 import triton as kernels
    from rl_accel.moe.hosts import humming

    print(f"humming: {humming.unavailable() or 'its version fits; its kernels have no arm here yet'}")
    rows: list[dict] = []
    data = torch.zeros(1 << 28, device="cuda")
    bandwidth = data.nbytes / measure({"sum": data.sum}, options.rounds)["sum"]

    def add(name: str, value: float, unit: str, incumbent: float, bound: float) -> None:
        ratio = incumbent / value
        rows.append(
            {"name": name, "value": value, "unit": unit, "incumbent": incumbent, "ratio": ratio, "bound": bound}
        )
        print(f"{name:<40} {value:9.3f} {unit} incumbent {incumbent:9.3f} {ratio:5.2f}x bound {bound:9.3f}", flush=True)

    for rank, batch in product(options.rank, options.batch):
        layers = [Layer(options, rank, seed) for seed in range(options.layers)]
        step = Step(options, batch)
        ours, bf16 = step.ours(layers), step.vllm(layers, options, lora=False)
        calls = {"ours": captured(ours), "bf16": captured(bf16)}
        if rank:
            calls |= {"eager": ours, "lora": step.vllm(layers, options, lora=True)}
        check_same(ours(), calls["lora"]() if rank else bf16())
        found = {name: 1e6 * value / len(layers) for name, value in measure(calls, options.rounds).items()}
        bound = 1e6 * step.num_experts * layers[0].bytes_per_expert / bandwidth
        name = f"moe_gpu.decode_us.b{batch}.r{rank}"
        add(f"{name}.bf16", found["ours"], "us", found["bf16"], bound)
        if rank:
            add(f"{name}.lora", found["eager"], "us", found["lora"], bound)
    w = torch.randn(options.experts, 2 * options.intermediate, options.hidden, device="cuda")
    found = measure(
        {"ours": lambda: kernels.quantize(w, options.bits, GROUP, ITERATIONS), "copy": w.clone}, options.rounds
    )
    bound = (4 + options.bits / 8 + 4 / GROUP) / bandwidth
    nanoseconds = {name: 1e9 * value / w.numel() for name, value in found.items()}
    add(f"moe_gpu.refresh_ns.{options.bits}", nanoseconds["ours"], "ns", nanoseconds["copy"], 1e9 * bound)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
