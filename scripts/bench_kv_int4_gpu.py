"""Time of the quantized KV cache on CUDA against vLLM's `int4_per_token_head` and its bfloat16 attention by Triton.

    python scripts/bench_kv_int4_gpu.py [--head-size 64 128] [--groups 4 8] [--context 1024 8192 32768]
        [--requests 8 64] [--queries 1 5] [--tokens 64 4096] [--rounds 9] [--no-tests] [--json FILE]

One process, arms take turns, a figure is the median of the rounds. Caches of an arm are larger than the L2 cache, 8 KV
heads, blocks of 16 tokens. `bound` is the time to read our pages at the bandwidth of a sum over memory measured here.
Runs the tests of the kernels first and stops if they fail. Nobody has run this on a GPU.

    kv_gpu.attend_us.d<head size>.g<query heads per KV head>.<context>x<requests>.q<queries>.<incumbent>
    kv_gpu.store_ns.d<head size>.<tokens>.int4               a token and head, K and V
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

from rl_accel.kernels.kv_int4 import triton as ours
from rl_accel.kernels.kv_int4.layout import PageLayout

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("tests/kernels/test_kv_int4_triton.py",)
KV_HEADS, BLOCK, ORDER = 8, 16, 16
SEGMENTS = 16
"""Of vLLM's kernel for decoding, as its backend sets it."""
Call = Callable[[], object]


def vllm_cache(num_blocks: int, size: int, dtype: str, device: str):
    """Return vLLM's cache of a dtype as its implementation splits it: K, V, and what its kernels are told besides."""
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl
    from vllm.v1.kv_cache_interface import KVQuantMode

    shape = TritonAttentionBackend.get_kv_cache_shape(num_blocks, BLOCK, KV_HEADS, size, dtype)
    if dtype == "auto":
        cache = torch.randn(shape, device=device).bfloat16().transpose(1, 2)
        return *cache.split(size, dim=-1), {}
    impl = object.__new__(TritonAttentionImpl)
    impl._kv_quant_mode = KVQuantMode.INT4_PER_TOKEN_HEAD
    key, value = impl._pth_key_value_caches(torch.randint(0, 256, shape, dtype=torch.uint8, device=device))
    return key, value, {"k_scale_cache": impl._k_scale_cache, "v_scale_cache": impl._v_scale_cache}


class Step:
    """One call of attention: requests of one length, the last tokens of each asking."""

    def __init__(self, size: int, groups: int, context: int, requests: int, queries: int, device: str):
        self.size, self.context, self.queries, self.device = size, context, queries, device
        blocks = -(-context // BLOCK)
        self.num_blocks = blocks * requests
        self.query = torch.randn(requests * queries, KV_HEADS * groups, size, device=device).bfloat16()
        self.out = torch.empty_like(self.query)
        self.table = torch.randperm(self.num_blocks, device=device).int().view(requests, blocks)
        self.start = torch.arange(requests + 1, dtype=torch.int32, device=device) * queries
        self.lens = torch.full((requests,), context, dtype=torch.int32, device=device)

    def ours(self) -> Call:
        layout = PageLayout(BLOCK, self.size)
        pages = torch.zeros(self.num_blocks, KV_HEADS, layout.page_bytes, dtype=torch.uint8, device=self.device)
        k, v = torch.randn(2, self.num_blocks * BLOCK, KV_HEADS, self.size, device=self.device).bfloat16()
        ours.store(pages, layout, torch.arange(len(k), device=self.device), k, v, ORDER)
        return lambda: ours.attend_batch(
            self.out, self.query, pages, layout, self.table, self.start, self.lens, self.size**-0.5, ORDER,
            max_seq_len=self.context,
        )  # fmt: skip

    def vllm(self, dtype: str) -> Call:
        from vllm.v1.attention.ops import int4_per_token_head, triton_unified_attention

        key, value, scales = vllm_cache(self.num_blocks, self.size, dtype, self.device)
        threshold, heads = 128 // KV_HEADS, self.query.shape[1]
        segments = {
            "seq_threshold_3D": threshold,
            "num_par_softmax_segments": SEGMENTS,
            "softmax_segm_output": torch.empty(threshold, heads, SEGMENTS, self.size, device=self.device),
            "softmax_segm_max": torch.empty(threshold, heads, SEGMENTS, device=self.device),
            "softmax_segm_expsum": torch.empty(threshold, heads, SEGMENTS, device=self.device),
        }
        shared = {
            "cu_seqlens_q": self.start, "max_seqlen_q": self.queries, "seqused_k": self.lens,
            "max_seqlen_k": self.context, "softmax_scale": self.size**-0.5, "window_size": (-1, -1),
            "block_table": self.table, "softcap": 0.0, "sinks": None, "alibi_slopes": None,
        }  # fmt: skip
        if dtype == "auto":
            return lambda: triton_unified_attention.unified_attention(
                self.query, key, value, self.out, causal=True, q_descale=None, k_descale=None, v_descale=None,
                **shared, **segments,
            )  # fmt: skip
        return lambda: int4_per_token_head.unified_attention_int4(
            self.query, key, value, self.out, use_alibi_sqrt=False, qq_bias=None, output_scale=None,
            mm_prefix_range=None, **scales, **shared, **segments,
        )  # fmt: skip


def store_calls(size: int, num_tokens: int, device: str) -> dict[str, Call]:
    from vllm.v1.attention.ops import int4_per_token_head

    layout, num_blocks = PageLayout(BLOCK, size), 4 * num_tokens
    k, v = torch.randn(2, num_tokens, KV_HEADS, size, device=device).bfloat16()
    slots = torch.randperm(num_blocks * BLOCK, device=device)[:num_tokens]
    pages = torch.zeros(num_blocks, KV_HEADS, layout.page_bytes, dtype=torch.uint8, device=device)
    key, value, scales = vllm_cache(num_blocks, size, "int4_per_token_head", device)
    return {
        "ours": lambda: ours.store(pages, layout, slots, k, v, ORDER),
        "int4": lambda: int4_per_token_head.reshape_and_cache_int4(k, v, key, value, slots, **scales),
    }


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(calls: dict[str, Call], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of a call of each, in turn, after two rounds of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-2, rounds):
        for name, call in calls.items():
            synchronize(device)
            started = time.perf_counter()
            call()
            synchronize(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
    return {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the interpreter, to try this")
    parser.add_argument("--head-size", nargs="*", type=int, default=[64, 128])
    parser.add_argument("--groups", nargs="*", type=int, default=[4, 8])
    parser.add_argument("--context", nargs="*", type=int, default=[1024, 8192, 32768])
    parser.add_argument("--requests", nargs="*", type=int, default=[8, 64])
    parser.add_argument("--queries", nargs="*", type=int, default=[1, 5])
    parser.add_argument("--tokens", nargs="*", type=int, default=[64, 4096], help="of a store")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--json", type=Path, help="write the results as a list of {name, value, unit, ...}")
    options = parser.parse_args()
    if not options.no_tests:
        subprocess.run([sys.executable, "-m", "pytest", "-q", *TESTS], cwd=ROOT, check=True)
    device, rows = options.device, []
    data = torch.zeros(1 << (28 if device == "cuda" else 20), device=device)
    bandwidth = data.nbytes / measure({"sum": data.sum}, options.rounds, device)["sum"]

    def add(name: str, value: float, unit: str, incumbent: float, bound: float) -> None:
        ratio = incumbent / value
        rows.append(
            {"name": name, "value": value, "unit": unit, "incumbent": incumbent, "ratio": ratio, "bound": bound}
        )
        print(f"{name:<52} {value:9.2f} {unit} incumbent {incumbent:9.2f} {ratio:5.2f}x bound {bound:9.2f}", flush=True)

    for size, groups, context, requests, queries in product(
        options.head_size, options.groups, options.context, options.requests, options.queries
    ):
        step = Step(size, groups, context, requests, queries, device)
        calls = {"ours": step.ours(), "int4": step.vllm("int4_per_token_head"), "bf16": step.vllm("auto")}
        found = measure(calls, options.rounds, device)
        bound = requests * context * KV_HEADS * PageLayout(BLOCK, size).token_bytes / bandwidth
        for incumbent in ("int4", "bf16"):
            name = f"kv_gpu.attend_us.d{size}.g{groups}.{context}x{requests}.q{queries}.{incumbent}"
            add(name, 1e6 * found["ours"], "us", 1e6 * found[incumbent], 1e6 * bound)
    for size, num_tokens in product(options.head_size, options.tokens):
        found = measure(store_calls(size, num_tokens, device), options.rounds, device)
        factor = 1e9 / num_tokens / KV_HEADS
        bound = (4 * size + PageLayout(BLOCK, size).token_bytes) / bandwidth * 1e9
        add(f"kv_gpu.store_ns.d{size}.{num_tokens}.int4", factor * found["ours"], "ns", factor * found["int4"], bound)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
