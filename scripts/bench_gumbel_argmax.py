"""Time of one sampling step: position-keyed Gumbel sampling against what vLLM does, on this machine.

    python scripts/bench_gumbel_argmax.py [--rows 48] [--vocab 32000 151936] [--repeats 9] [--json FILE]

Incumbents in the same process, calls interleaved: `exponential` (softmax, exponential noise, division,
argmax: vLLM's `random_sample`) and `multinomial` (softmax, torch.multinomial). Ours: the PyTorch
specification on CPU, the Triton kernel on CUDA (and the specification there, for comparison). The bound is
the time to read the logits once at the bandwidth of a plain `logits.amax()`, measured here. Runs the
operation's tests first and stops if they fail.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from rl_accel.kernels.gumbel_argmax.api import gumbel_argmax
from rl_accel.kernels.gumbel_argmax.reference import gumbel_argmax_reference

TESTS = ("tests/sampling/test_noise.py", "tests/kernels/test_gumbel_argmax.py")


def exponential(logits_RV: torch.Tensor) -> torch.Tensor:
    """vLLM v1/sample/ops/topk_topp_sampler.py, random_sample."""
    probs = logits_RV.softmax(dim=-1, dtype=torch.float32)
    return probs.div_(torch.empty_like(probs).exponential_()).argmax(dim=-1)


def multinomial(logits_RV: torch.Tensor) -> torch.Tensor:
    return torch.multinomial(logits_RV.softmax(dim=-1, dtype=torch.float32), 1).view(-1)


def measure(calls: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, torch.Tensor]:
    """Seconds of every repeat by name; one call of each in turn, after two warm-up rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(-2, repeats):
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in seconds.items()}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def bench(num_rows: int, vocab_size: int, masked: bool, repeats: int, device: str) -> list[dict]:
    """Results for one shape; `masked` leaves 50 logits per row, as top-k does."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(num_rows, vocab_size, device=device, generator=generator) * 4
    if masked:
        kept = logits.topk(min(50, vocab_size), dim=1)
        logits = torch.full_like(logits, -torch.inf).scatter_(1, kept.indices, kept.values)
    keys = torch.arange(num_rows, device=device)
    calls: dict[str, Callable[[], object]] = {
        "gumbel_argmax": lambda: gumbel_argmax(logits, keys, keys),
        "exponential": lambda: exponential(logits),
        "multinomial": lambda: multinomial(logits),
        "read": lambda: logits.amax(),
    }
    if device == "cuda":
        calls["specification"] = lambda: gumbel_argmax_reference(logits, keys, keys)
    seconds = measure(calls, repeats, device)
    p50 = {name: float(values.median()) for name, values in seconds.items()}
    results = []
    for name, values in seconds.items():
        if name == "read":
            continue
        p95 = float(values.quantile(0.95))
        shape = f"{device} R={num_rows} V={vocab_size}{' top-50' if masked else ''}"
        print(
            f"{shape:<32} {name:<14} p50 {p50[name] * 1e3:9.3f} ms  p95 {p95 * 1e3:9.3f} ms  "
            f"bound {p50['read'] * 1e3:8.3f} ms"
        )
        if name in ("exponential", "multinomial"):
            results.append(
                {
                    "name": f"gumbel_argmax vs {name}, {shape}",
                    "value": p50["gumbel_argmax"] * 1e3,
                    "unit": "ms",
                    "incumbent": p50[name] * 1e3,
                    "ratio": p50[name] / p50["gumbel_argmax"],
                    "bound": p50["read"] * 1e3,
                }
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 48])
    parser.add_argument("--vocab", type=int, nargs="+", default=[300, 32000, 151936])
    parser.add_argument("--repeats", type=int, default=9, help="at least 5")
    parser.add_argument("--json", type=Path, help="write the results as a list of {name, value, unit, ...}")
    options = parser.parse_args()
    if options.repeats < 5:
        parser.error("--repeats must be at least 5")
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-m", "pytest", "-q", *TESTS], cwd=root, check=True)

    results = []
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for vocab_size in options.vocab:
            for num_rows in options.rows:
                for masked in (False, True):
                    results += bench(num_rows, vocab_size, masked, options.repeats, device)
    for result in results:
        print(f"{result['name']:<60} {result['ratio']:6.2f}x")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
