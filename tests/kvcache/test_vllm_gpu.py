"""The quantized KV cache's CUDA backend for vLLM: what it promises, and its layers in Triton's interpreter.

In a process of its own, because vLLM takes Triton only if it is told before the import that a backend is there, and
`TRITON_INTERPRET` must be set before Triton is imported. No engine runs here: that takes a GPU."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import types

import pytest
import torch

from rl_accel.errors import NotLiveError
from rl_accel.kernels.kv_int4 import reference
from rl_accel.kernels.kv_int4.layout import PageLayout
from rl_accel.kvcache.rotation import Rotation

HEADS, KV_HEADS, SIZE, BLOCK = 6, 2, 80, 16


def config(**settings: object):
    from vllm.config import VllmConfig

    return VllmConfig(additional_config={"rl_accel": {"kvcache": {"enable": True, **settings}}})


def layer(dtype: str, **settings: object):
    from vllm.config import set_current_vllm_config

    from rl_accel.kvcache.hosts.vllm_gpu import GpuKVInt4Impl

    with set_current_vllm_config(config(**settings)):
        return GpuKVInt4Impl(HEADS, SIZE, SIZE**-0.5, KV_HEADS, None, None, dtype)


def check_backend() -> None:
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode

    from rl_accel.kvcache.hosts import register, vllm_gpu

    backend = vllm_gpu.GpuKVInt4Backend
    assert f"{backend.__module__}.{backend.__qualname__}" == register.GPU_BACKEND
    for cls in (backend, backend.of_8_bits(), backend.get_impl_cls(), backend.get_builder_cls()):
        assert not inspect.isabstract(cls), cls
    asked = {
        "head_size": SIZE, "dtype": torch.bfloat16, "kv_cache_dtype": "int4_per_token_head", "block_size": BLOCK,
        "use_mla": False, "has_sink": False, "use_sparse": False, "use_mm_prefix": False,
        "use_per_head_quant_scales": False, "device_capability": DeviceCapability(9, 0), "attn_type": "decoder",
    }  # fmt: skip
    assert set(asked) <= set(inspect.signature(AttentionBackend.validate_configuration).parameters)
    assert backend.validate_configuration(**asked) == []
    assert backend.validate_configuration(**asked | {"kv_cache_dtype": "auto"}) == []
    for change in (
        {"head_size": 72}, {"kv_cache_dtype": "fp8"}, {"block_size": 24}, {"use_mla": True}, {"has_sink": True},
        {"use_mm_prefix": True}, {"device_capability": DeviceCapability(7, 5)}, {"attn_type": "encoder"},
        {"has_sliding_window": True}, {"use_non_causal": True}, {"use_kv_connector": True},
    ):  # fmt: skip
        assert len(backend.validate_configuration(**asked | change)) == 1, change
    for bits, cls in ((4, backend), (8, backend.of_8_bits())):
        spec = cls.customize_spec(
            FullAttentionSpec(block_size=BLOCK, num_kv_heads=KV_HEADS, head_size=SIZE, dtype=torch.bfloat16,
                              kv_quant_mode=KVQuantMode.INT4_PER_TOKEN_HEAD)
        )  # fmt: skip
        shape = cls.get_kv_cache_shape(7, BLOCK, KV_HEADS, SIZE, "int4_per_token_head")
        page_bytes = PageLayout(BLOCK, SIZE, bits).page_bytes
        assert spec.page_size_bytes == KV_HEADS * page_bytes == torch.Size(shape[1:]).numel()
        assert spec.dtype == torch.uint8 and shape[:3] == (7, KV_HEADS, BLOCK)
    assert backend.get_kv_cache_stride_order() == (0, 1, 2, 3) and backend.indexes_kv_by_block_stride()
    assert not backend.use_cascade_attention() and backend.get_name() == "CUSTOM"


def check_refusals() -> None:
    from vllm.config import set_current_vllm_config

    from rl_accel.kvcache.hosts.vllm_gpu import GpuKVInt4Impl

    stock = [HEADS, SIZE, 0.1, KV_HEADS, None, None, "int4_per_token_head"]
    for position, value, words in ((1, 72, "head size"), (4, [1.0] * HEADS, "ALiBi"), (5, 128, "sliding windows")):
        arguments = [*stock[:position], value, *stock[position + 1 :]]
        with set_current_vllm_config(config()), pytest.raises(NotLiveError, match=words):
            GpuKVInt4Impl(*arguments)
    with pytest.raises(NotLiveError, match="rotate_v"):
        layer("int4_per_token_head", rotate_v=True)


def check_builder() -> None:
    """Tensors are handed on as they are: a captured graph reads what vLLM writes there later."""
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from rl_accel.kvcache.hosts.vllm_gpu import GpuKVInt4MetadataBuilder

    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=KV_HEADS, head_size=SIZE, dtype=torch.uint8)
    held = types.SimpleNamespace(model_config=types.SimpleNamespace(max_model_len=4096))
    builder = GpuKVInt4MetadataBuilder(spec, ["layer"], held, torch.device("cpu"))
    common = types.SimpleNamespace(
        num_actual_tokens=3, max_query_len=2, max_seq_len=40, causal=True, query_start_loc=torch.tensor([0, 2, 3]),
        seq_lens=torch.tensor([40, 7]), block_table_tensor=torch.zeros(2, 9).int(), slot_mapping=torch.arange(3),
    )  # fmt: skip
    found = builder.build(0, common)
    for name in ("query_start_loc", "seq_lens", "slot_mapping"):
        assert getattr(found, name) is getattr(common, name)
    assert found.block_table is common.block_table_tensor
    captured = builder.build_for_cudagraph_capture(common)
    assert captured.max_seq_len == 4096 and common.seq_lens.tolist() == [1, 1]
    assert builder._cudagraph_support == AttentionCGSupport.ALWAYS
    common.causal = False
    with pytest.raises(NotLiveError, match="not causal"):
        builder.build(0, common)


def check_layers() -> None:
    """A prompt in two chunks, then a step, against the specification; before and after the rotation is set anew, which
    changes tensors and no argument; padded tokens and requests, as in a captured graph."""
    from rl_accel.kvcache.hosts.vllm_gpu import GpuKVInt4Backend, GpuKVInt4Metadata

    generator = torch.Generator().manual_seed(0)
    table = torch.tensor([[3, 1, 0, 9], [9, 9, 9, 9]]).int()
    for dtype, bits in (("int4_per_token_head", 4), ("auto", 8)):
        impl, layout = layer(dtype, order=8), PageLayout(BLOCK, SIZE, bits)
        backend = GpuKVInt4Backend if bits == 4 else GpuKVInt4Backend.of_8_bits()
        assert impl.bits == bits
        cache = torch.full(backend.get_kv_cache_shape(4, BLOCK, KV_HEADS, SIZE, dtype), 0xFF, dtype=torch.uint8)
        want_pages = cache.clone().view(4, KV_HEADS, -1)
        k, v = torch.randn(2, 35, KV_HEADS, SIZE, generator=generator)
        query = torch.randn(35, HEADS, SIZE, generator=generator)
        shift = torch.randn(KV_HEADS, SIZE, generator=generator)
        held = None
        exponents = torch.randint(-3, 4, (KV_HEADS, SIZE), generator=generator).int()
        for rotation in (Rotation(8), Rotation(16, shift, exponents), Rotation(1))[: 3 if bits == 4 else 2]:
            impl.set_rotation(rotation)
            factors = rotation.key_factors(k.dtype), rotation.query_factors(HEADS, k.dtype)
            k_in, q_in = (x if f is None else x * f for x, f in zip((k, query), factors, strict=True))
            for start, end in ((0, 20), (20, 34), (34, 35)):
                position = torch.arange(start, end)
                slots = table[0, position // BLOCK].long() * BLOCK + position % BLOCK
                padded = torch.cat([slots, torch.tensor([-1, -1])])
                more = torch.full((2, KV_HEADS, SIZE), torch.nan)
                keys, values = torch.cat([k[start:end], more]), torch.cat([v[start:end], more])
                impl.do_kv_cache_update(None, keys, values, cache, padded)
                reference.store(
                    want_pages, layout, slots, k_in[start:end], v[start:end], rotation.order, rotation.shift_KC
                )
                assert torch.equal(cache.view(4, KV_HEADS, -1), want_pages)
                count = end - start
                metadata = GpuKVInt4Metadata(count, count, 64, torch.tensor([0, count, count]).int(),
                                             torch.tensor([end, 0]).int(), table, padded)  # fmt: skip
                queries = torch.cat([query[start:end], torch.full((2, HEADS, SIZE), torch.nan)])
                output = torch.full_like(queries, -1024.0)
                assert impl.forward(None, queries, keys, values, cache, metadata, output) is output
                want = reference.attend(want_pages, layout, [3, 1, 0], q_in[start:end], end, SIZE**-0.5, rotation.order)
                assert torch.equal(output[:count], want) and (output[count:] == -1024.0).all()
            held = held or impl._on_device
            assert all(a is b for a, b in zip(held, impl._on_device, strict=True)), "a graph would read the old ones"
        output = torch.ones(3, HEADS, SIZE)
        assert not impl.forward(None, output, output, output, cache, None, output).any()
        with pytest.raises(NotImplementedError):
            impl.forward(None, output, output, output, cache, None, output, torch.ones(1))


CHECKS = {"backend": check_backend, "refusals": check_refusals, "builder": check_builder, "layers": check_layers}


def test_backend_and_layers_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    pytest.importorskip("vllm.v1.attention.backends.triton_attn")
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if line.startswith("ok ")] == [f"ok {name}" for name in CHECKS]


if __name__ == "__main__":
    import triton.backends

    triton.backends.backends["cpu"] = types.SimpleNamespace(driver=None, compiler=None)
    for name, check in CHECKS.items():
        check()
        print("ok", name)
