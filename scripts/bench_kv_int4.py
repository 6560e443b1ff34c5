"""Time of the quantized KV cache on the CPU against vLLM's own attention over bfloat16 pages.

    python scripts/bench_kv_int4.py [--part decode prefill store] [--head-size 64 128] [--groups 1 2 4 8]
        [--context 512 4096 16384] [--instructions auto] [--bits 4] [--threads 1] [--rounds 7] [--incumbent-avx2]
        [--json FILE]

One process; arms take turns by rounds, a round gives the median of its calls, and a figure is the median of the rounds;
with one thread its CPU time is taken. Queries are bfloat16 in all arms. The pages of an arm are several copies, 96 MiB
in all, taken in turn, so that a call reads from memory. A decode call has 2 KV heads and 8192 tokens of each, in one or
more requests; a prefill call is one prompt, all of whose tokens are queries; a store call writes the K and V of the
tokens of a step. `--incumbent-avx2` has vLLM take its AVX2 build where it would take the one for AVX-512.

    kv.decode_us.d<head size>.g<query heads per KV head>.<context>.<instructions>
    kv.prefill_ms.d<head size>.g<..>.<prompt>.<instructions>
    kv.store_ns.d<head size>.<tokens>.<instructions>       a token and head, K and V
    kv.blocks_ratio.d<head size>                           blocks in as much memory, from the layout

`bound` is the time to read the pages once (of a store: to read K and V and to write them), at the bandwidth of a sum
over memory measured here. Runs the tests of the kernels first and stops if they fail.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from rl_accel import machine
from rl_accel.hosts import versions
from rl_accel.kernels.kv_int4 import api, cpp
from rl_accel.kernels.kv_int4.layout import PageLayout

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("tests/kernels/test_kv_int4.py", "tests/kernels/test_kv_int4_cpp.py")
POOL_BYTES = 96 << 20
"""Of the pages of an arm: more than a cache holds."""
BLOCK = 128
KV_HEADS = 2
DECODE_TOKENS = 8192
ROUND_S = 0.02
"""An arm's share of a round, at least."""
ORDER = 16
Call = Callable[[], object]


class Batch:
    """Requests of one length whose last `num_queries` tokens ask."""

    def __init__(self, head_size: int, groups: int, context: int, num_requests: int, num_queries: int):
        self.head_size, self.groups, self.context, self.num_requests = head_size, groups, context, num_requests
        num_blocks = -(-context // BLOCK)
        self.num_blocks = num_blocks * num_requests
        self.query = torch.randn(num_requests * num_queries, KV_HEADS * groups, head_size).bfloat16()
        self.table = torch.randperm(self.num_blocks).int().view(num_requests, num_blocks)
        self.start = torch.arange(num_requests + 1, dtype=torch.int32) * num_queries
        self.lens = torch.full((num_requests,), context, dtype=torch.int32)
        self.scale = head_size**-0.5

    def ours(self, bits: int) -> list[Call]:
        layout = PageLayout(BLOCK, self.head_size, bits)
        first = aligned(self.num_blocks, KV_HEADS, layout.page_bytes)
        k, v = torch.randn(2, self.num_blocks * BLOCK, KV_HEADS, self.head_size)
        api.store(first, layout, torch.arange(len(k)), k, v, ORDER)
        out = torch.empty_like(self.query)
        calls = []
        for _ in range(max(1, POOL_BYTES // first.nbytes)):
            pages = aligned(*first.shape).copy_(first)
            calls.append(
                lambda pages=pages: cpp.attend_batch(
                    out, self.query, pages, layout, self.table, self.start, self.lens, self.scale, ORDER
                )
            )
        return calls

    def stock(self) -> list[Call]:
        from vllm import _custom_ops as ops

        out, num_heads = torch.empty_like(self.query), KV_HEADS * self.groups
        metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=self.num_requests, num_heads=num_heads, num_kv_heads=KV_HEADS, head_dim=self.head_size,
            seq_lens=self.lens, dtype=torch.bfloat16, query_start_loc=self.start, causal=True,
            sliding_window_size=-1, isa=stock_isa(self.head_size), enable_kv_split=True,
        )  # fmt: skip

        def call(k: torch.Tensor, v: torch.Tensor) -> Call:
            return lambda: ops.cpu_attention_with_kv_cache(
                query=self.query, key_cache=k, value_cache=v, output=out, query_start_loc=self.start,
                seq_lens=self.lens, scale=self.scale, causal=True, alibi_slopes=None, sliding_window=-1,
                block_table=self.table, softcap=0, scheduler_metadata=metadata, s_aux=None,
            )  # fmt: skip

        first = torch.randn(self.num_blocks, KV_HEADS, 2 * BLOCK, self.head_size).bfloat16()
        pools = [first, *(first.clone() for _ in range(POOL_BYTES // first.nbytes - 1))]
        return [call(*pages.chunk(2, dim=2)) for pages in pools]


def store_calls(head_size: int, num_tokens: int, bits: int) -> dict[str, list[Call]]:
    """Calls that store a step's tokens: those of a prompt in one piece, or one of each of several requests."""
    from vllm import _custom_ops as ops

    layout, num_blocks = PageLayout(BLOCK, head_size, bits), 2 * max(num_tokens // BLOCK, 64)
    k, v = torch.randn(2, num_tokens, KV_HEADS, head_size).bfloat16()
    slots = torch.arange(num_tokens)
    if num_tokens < BLOCK:
        slots = slots * BLOCK + torch.randint(BLOCK, (num_tokens,))
    pages = aligned(num_blocks, KV_HEADS, layout.page_bytes)
    pages_k, pages_v = torch.zeros(num_blocks, KV_HEADS, 2 * BLOCK, head_size).bfloat16().chunk(2, dim=2)
    isa = stock_isa(head_size)
    return {
        "stock": [lambda: ops.cpu_attn_reshape_and_cache(k, v, pages_k, pages_v, slots, isa)],
        "ours": [lambda: cpp.store(pages, layout, slots, k, v, ORDER, None)],
    }


def aligned(*shape: int) -> torch.Tensor:
    """Zeros uint8 that start at a multiple of 64 bytes."""
    numel = torch.Size(shape).numel()
    data = torch.zeros(numel + 64, dtype=torch.uint8)
    return data[-data.data_ptr() % 64 :][:numel].view(shape)


def stock_isa(head_size: int) -> str:
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return _get_attn_isa(torch.bfloat16, BLOCK, head_size)


def load_incumbent(avx2: bool) -> None:
    """Import vLLM's kernels, whose build is chosen by what torch says of the CPU."""
    if avx2:
        torch.cpu._is_avx512_supported = torch.cpu._is_avx512_bf16_supported = lambda: False
    from vllm.platforms import current_platform

    current_platform.import_kernels()


def clock() -> float:
    """Seconds: of the calling thread where it is the only one, so that other programs count little; else wall time."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def measure(arms: dict[str, tuple[str | None, list[Call]]], rounds: int) -> dict[str, float]:
    """Seconds of a call by arm: medians of rounds. An arm is an instruction set (None: not ours) and its calls."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(-1, rounds):
        for name, (instructions, calls) in arms.items():
            if instructions:
                cpp.set_instructions(instructions)
            found: list[float] = []
            deadline = clock() + ROUND_S
            while not found or clock() < deadline:
                for call in calls:
                    started = clock()
                    call()
                    found.append(clock() - started)
            if number >= 0:
                seconds[name].append(median(found))
    return {name: median(values) for name, values in seconds.items()}


def read_bandwidth(rounds: int = 9) -> float:
    """Bytes a second of a sum over memory, the best round."""
    data = torch.zeros(64 << 18)
    best = 0.0
    for _ in range(rounds):
        started = clock()
        data.sum()
        best = max(best, data.nbytes / (clock() - started))
    return best


class Report:
    def __init__(self, options: argparse.Namespace):
        self.options, self.rows = options, []
        self.bandwidth = read_bandwidth()

    def compare(self, name: str, unit: str, factor: float, stock: list[Call], ours: list[Call], bound: float | None):
        """Measure and add rows; `factor` turns seconds of a call to the unit, `bound` is in the unit."""
        arms: dict[str, tuple[str | None, list[Call]]] = {"stock": (None, stock)}
        arms |= {f"{name}.{found}": (found, ours) for found in self.options.instructions}
        times = measure(arms, self.options.rounds)
        theirs = times.pop("stock") * factor
        for label, seconds in times.items():
            self.add(label, seconds * factor, unit, theirs, theirs / (seconds * factor), bound)

    def add(self, name: str, value: float, unit: str, incumbent: float, ratio: float, bound: float | None) -> None:
        self.rows.append(
            {"name": name, "value": value, "unit": unit, "incumbent": incumbent, "ratio": ratio, "bound": bound}
        )
        limit = "" if bound is None else f"  bound {bound:9.2f}"
        print(f"{name:<40} {value:9.2f} {unit:<4} stock {incumbent:9.2f}  {ratio:5.2f}x{limit}", flush=True)

    def decode(self, head_size: int, groups: int, context: int) -> None:
        batch = Batch(head_size, groups, context, max(1, DECODE_TOKENS // context), 1)
        bits = self.options.bits
        tokens = batch.num_requests * context * KV_HEADS
        bound = tokens * PageLayout(BLOCK, head_size, bits).token_bytes / self.bandwidth * 1e6
        self.compare(
            f"kv.decode_us.d{head_size}.g{groups}.{context}", "us", 1e6, batch.stock(), batch.ours(bits), bound
        )

    def prefill(self, head_size: int, groups: int, prompt: int) -> None:
        batch = Batch(head_size, groups, prompt, 1, prompt)
        stock, ours = batch.stock()[:1], batch.ours(self.options.bits)[:1]
        self.compare(f"kv.prefill_ms.d{head_size}.g{groups}.{prompt}", "ms", 1e3, stock, ours, None)

    def store(self, head_size: int, num_tokens: int) -> None:
        calls = store_calls(head_size, num_tokens, self.options.bits)
        num_bytes = 2 * 2 * head_size + PageLayout(BLOCK, head_size, self.options.bits).token_bytes
        self.compare(
            f"kv.store_ns.d{head_size}.{num_tokens}", "ns", 1e9 / num_tokens / KV_HEADS,
            calls["stock"], calls["ours"], num_bytes / self.bandwidth * 1e9,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--part", nargs="*", choices=("decode", "prefill", "store"), default=["decode", "prefill", "store"]
    )
    parser.add_argument("--head-size", nargs="*", type=int, default=[64, 128])
    parser.add_argument("--groups", nargs="*", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--context", nargs="*", type=int, default=[512, 4096, 16384])
    parser.add_argument("--instructions", nargs="*", default=["auto"], help="auto, scalar, avx2, avx512")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7, help="at least 5")
    parser.add_argument("--incumbent-avx2", action="store_true")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--json", type=Path, help="write the results as a list of {name, value, unit, ...}")
    options = parser.parse_args()
    if options.rounds < 5:
        parser.error("--rounds must be at least 5")
    if not options.no_tests:
        subprocess.run([sys.executable, "-m", "pytest", "-q", *TESTS], cwd=ROOT, check=True)
    load_incumbent(options.incumbent_avx2)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cpp.set_instructions("auto")
    options.instructions = [cpp.instructions() if name == "auto" else name for name in options.instructions]
    report = Report(options)
    conditions = {
        "command": " ".join(sys.argv), "machine": machine.describe(), "versions": versions.report(),
        "load": os.getloadavg()[0], "threads": options.threads, "instructions": options.instructions,
        "incumbent": "vLLM bfloat16, " + ("AVX2" if options.incumbent_avx2 else "its own choice"),
        "read_GB/s": report.bandwidth / 1e9,
    }  # fmt: skip
    print(conditions)
    for head_size in options.head_size:
        ratio = 4 * head_size / PageLayout(BLOCK, head_size, options.bits).token_bytes
        report.add(f"kv.blocks_ratio.d{head_size}", ratio, "x", 1.0, ratio, None)
        for part in options.part:
            if part == "store":
                for num_tokens in (16, 2048):
                    report.store(head_size, num_tokens)
                continue
            for groups in options.groups:
                if part == "prefill":
                    report.prefill(head_size, groups, 2048)
                else:
                    for context in options.context:
                        report.decode(head_size, groups, context)
    if options.json:
        report.rows.append({"name": "kv.conditions", "value": None, **conditions})
        options.json.write_text(json.dumps(report.rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
