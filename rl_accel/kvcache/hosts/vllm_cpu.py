"""vLLM's CPU attention with quantized pages: backends for layers of 4 and 8 bits.

Stock vLLM 0.28 accepts `kv_cache_dtype=int4_per_token_head` on a CPU and computes garbage without a word: its kernels
take every quantized dtype for fp8. Here pages have the bytes that they say, and the engine counts blocks by them.

Host symbols: `CPUAttentionBackend` and its metadata (v1/attention/backends/cpu_attn.py); `customize_spec`,
`get_kv_cache_shape`, `forward_includes_kv_cache_update` (v1/attention/backend.py); `AttentionSpec.state_content_bytes`
(v1/kv_cache_interface.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionMetadata

from rl_accel.kvcache.config import DTYPE
from rl_accel.kvcache.hosts.layers import QuantizedPages, token_bytes


class KVInt4Backend(CPUAttentionBackend):
    """Layers of 4 bits. Its name stays the stock one, by which vLLM looks backends up."""

    bits = 4
    supported_kv_cache_dtypes = [*CPUAttentionBackend.supported_kv_cache_dtypes, DTYPE]  # noqa: RUF012

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return []  # any, a multiple of 16

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return False

    @staticmethod
    def of_8_bits() -> type[KVInt4Backend]:
        return KVInt8Backend

    @staticmethod
    def get_impl_cls() -> type[KVInt4Impl]:  # type: ignore[override]
        return KVInt4Impl

    @staticmethod
    def get_builder_cls() -> type[KVInt4MetadataBuilder]:  # type: ignore[override]
        return KVInt4MetadataBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        return replace(spec, dtype=torch.uint8, state_content_bytes=token_bytes(spec.head_size, cls.bits))

    @classmethod
    def get_kv_cache_shape(  # type: ignore[override]
        cls, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        return num_blocks, num_kv_heads, block_size, token_bytes(head_size, cls.bits)


class KVInt8Backend(KVInt4Backend):
    """Layers of 8 bits; given to them once they are built."""

    bits = 8


class KVInt4MetadataBuilder(AttentionMetadataBuilder[CPUAttentionMetadata]):
    """Hands on what the kernels need; there is nothing to schedule ahead."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        common = common_attn_metadata
        return CPUAttentionMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            scheduler_metadata=None,
            causal=True,
        )


class KVInt4Impl(QuantizedPages, AttentionImpl):  # type: ignore[misc]
    """By the kernels for CPUs."""
