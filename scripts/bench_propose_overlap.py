"""A step of the suffix index beside a busy GPU: does it fit into a forward pass, and does either slow the other?

    python scripts/bench_propose_overlap.py [--repeats 5] [--json FILE]

Data and step of `propose_512` in bench_suffix.py: 512 live requests, one core. The pass is the matrix products of a 7B
model over 512 tokens, in one CUDA graph. Taking turns, 20 times a repeat: the pass alone, the step alone, the step
while the pass runs. `ratio` is against the step alone, and for both together against one after the other; `bound` is
the pass alone. Needs an NVIDIA GPU with 14 GiB of free memory.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
from bench_suffix import CAP, LIVE_LENGTH, STEPS, WARM_UP, Batch, Workload, begin, report, row

NUM_TOKENS, HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_LAYERS = 512, 4096, 11008, 32


def captured_pass() -> torch.cuda.CUDAGraph:
    """The matrix products of all layers: QKV, attention output, gate and up, down."""
    shapes = (
        (HIDDEN_SIZE, 3 * HIDDEN_SIZE),
        (HIDDEN_SIZE, HIDDEN_SIZE),
        (HIDDEN_SIZE, 2 * INTERMEDIATE_SIZE),
        (INTERMEDIATE_SIZE, HIDDEN_SIZE),
    )
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    inputs = {size: torch.randn(NUM_TOKENS, size, **kind) for size in (HIDDEN_SIZE, INTERMEDIATE_SIZE)}
    weights = [torch.randn(shape, **kind) for _ in range(NUM_LAYERS) for shape in shapes]

    def products() -> None:
        for weight in weights:
            inputs[weight.shape[0]] @ weight

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        products()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        products()
    graph.operands = inputs, weights  # the graph knows addresses only
    return graph


def timed(graph: torch.cuda.CUDAGraph | None, batch: Batch | None, position: int = 0) -> tuple[float, float]:
    """Milliseconds of the step, and until step and pass are done; None: without it."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    if graph is not None:
        graph.replay()
    step_s = batch.step(position)[0] if batch is not None else 0.0
    torch.cuda.synchronize()
    return step_s * 1e3, (time.perf_counter() - started) * 1e3


def bench(repeats: int) -> list[dict]:
    num_steps = repeats * STEPS
    batch = Batch(Workload.make(LIVE_LENGTH + 2 * (WARM_UP + num_steps) + CAP + 1))
    graph = captured_pass()
    positions = iter(range(LIVE_LENGTH, LIVE_LENGTH + 2 * (WARM_UP + num_steps)))
    passes, alone, beside, both = [], [], [], []
    for _ in range(WARM_UP + num_steps):
        passes.append(timed(graph, None)[1])
        alone.append(timed(None, batch, next(positions))[0])
        step_ms, all_ms = timed(graph, batch, next(positions))
        beside.append(step_ms)
        both.append(all_ms)
    rows = []
    for percentile in (50, 95):
        pass_ms, alone_ms, beside_ms, both_ms = (
            float(np.percentile(times[WARM_UP:], percentile)) for times in (passes, alone, beside, both)
        )
        print(
            f"p{percentile}: pass {pass_ms:.3f} ms; step {alone_ms:.3f} ms alone, {beside_ms:.3f} ms beside the pass, "
            f"{beside_ms / pass_ms:.1%} of it; both together {both_ms:.3f} ms"
        )
        rows.append(row(f"propose_512_beside_gpu.p{percentile}_ms", beside_ms, "ms", alone_ms, pass_ms))
        rows.append(row(f"pass_7b_with_propose_512.p{percentile}_ms", both_ms, "ms", pass_ms + alone_ms, pass_ms))
    return rows


def main() -> None:
    options = begin(__doc__)
    if not torch.cuda.is_available():
        sys.exit("bench_propose_overlap: no GPU here")
    print(f"beside {torch.cuda.get_device_name(0)}")
    report(bench(options.repeats), options.json)


if __name__ == "__main__":
    main()
