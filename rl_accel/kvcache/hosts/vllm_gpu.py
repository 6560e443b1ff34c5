"""vLLM's attention with quantized pages on CUDA: the backend CUSTOM, by the kernels of `kernels/kv_int4/triton.py`.

One kernel serves all query lengths, so a decoding step and the verification of drafts add up in the same order, and the
grid depends on nothing that only the device knows: steps of every shape can be captured in CUDA graphs. What may
change after a capture, order and shift of K, lives in tensors that the kernels read.

Left out, by name: what `layers.refuse` refuses, rotated V, KV connectors (nobody has tried whether they keep pages
whole), GPUs older than compute capability 8.0 (products of int8 in tiles of 32). Nobody has run this on a GPU.

Host symbols: `TritonAttentionBackend` (v1/attention/backends/triton_attn.py); `AttentionBackend`, `AttentionImpl`,
`AttentionMetadataBuilder`, `AttentionCGSupport` (v1/attention/backend.py); `AttentionSpec.state_content_bytes`
(v1/kv_cache_interface.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionCGSupport, AttentionImpl, AttentionMetadataBuilder
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

from rl_accel.errors import NotLiveError
from rl_accel.kernels.kv_int4.layout import LANES
from rl_accel.kvcache.config import DTYPE
from rl_accel.kvcache.hosts.layers import QuantizedPages, token_bytes
from rl_accel.kvcache.rotation import Rotation

MIN_CAPABILITY = (8, 0)


class GpuKVInt4Backend(TritonAttentionBackend):
    """Layers of 4 bits. The cache is [blocks, KV heads, block size, bytes of a token], in memory as it is named."""

    bits = 4
    supported_kv_cache_dtypes: ClassVar[list] = ["auto", DTYPE]  # auto: the layers that vLLM skips, of 8 bits

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def of_8_bits() -> type[GpuKVInt4Backend]:
        return GpuKVInt8Backend

    @staticmethod
    def get_impl_cls() -> type[GpuKVInt4Impl]:  # type: ignore[override]
        return GpuKVInt4Impl

    @staticmethod
    def get_builder_cls() -> type[GpuKVInt4MetadataBuilder]:  # type: ignore[override]
        return GpuKVInt4MetadataBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        return replace(spec, dtype=torch.uint8, state_content_bytes=token_bytes(spec.head_size, cls.bits))

    @classmethod
    def get_kv_cache_shape(  # type: ignore[override]
        cls, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        if block_size % LANES:
            raise ValueError(f"rl_accel.kvcache needs blocks of a multiple of {LANES} tokens; got {block_size}")
        return num_blocks, num_kv_heads, block_size, token_bytes(head_size, cls.bits)

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """A page is in one piece whatever layout vLLM prefers; layers may lie between the blocks of one."""
        return (1, 0, 2, 3, 4) if include_num_layers_dimension else (0, 1, 2, 3)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % LANES == 0

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return capability >= DeviceCapability(*MIN_CAPABILITY)

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == "decoder"

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return False

    @classmethod
    def supports_sink(cls) -> bool:
        return False

    @classmethod
    def supports_alibi_sqrt(cls) -> bool:
        return False

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False


class GpuKVInt8Backend(GpuKVInt4Backend):
    """Layers of 8 bits; given to them once they are built."""

    bits = 8


@dataclass
class GpuKVInt4Metadata:
    """What a step's attention needs, [S] by request."""

    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    """Upper bound of `seq_lens`; of a captured graph, for all its replays."""
    query_start_loc: torch.Tensor
    """int32 [S + 1]"""
    seq_lens: torch.Tensor
    """int32 [S]"""
    block_table: torch.Tensor
    """int32 [S, blocks]"""
    slot_mapping: torch.Tensor
    """int64 [tokens]"""
    causal: bool = True


class GpuKVInt4MetadataBuilder(AttentionMetadataBuilder[GpuKVInt4Metadata]):
    """Hands on vLLM's persistent tensors; there is nothing to schedule ahead."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS
    supports_draft_decode_metadata_update = True

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> GpuKVInt4Metadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise NotLiveError("rl_accel.kvcache does not cover attention that is not causal; set enable=false")
        return GpuKVInt4Metadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
        )

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> GpuKVInt4Metadata:
        """Captured with lengths of 1, which is quick, and a grid for the longest that a replay may have."""
        metadata = self.build(0, common_attn_metadata)
        metadata.seq_lens.fill_(1)
        metadata.max_seq_len = max(metadata.max_seq_len, self.vllm_config.model_config.max_model_len)
        return metadata

    def update_draft_decode_metadata(self, metadata: GpuKVInt4Metadata) -> None:
        """Nothing here is a copy of what changes between the steps of a drafter."""


class GpuKVInt4Impl(QuantizedPages, AttentionImpl):  # type: ignore[misc]
    """By the Triton kernels, with what a captured graph must find where it was in tensors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """
        Raises:
            NotLiveError: for attention that quantized pages do not serve, and for rotated V.
        """
        super().__init__(*args, **kwargs)
        if self.settings.rotate_v:
            raise NotLiveError("rl_accel.kvcache.rotate_v=true is of the CPU alone; leave it off on a GPU")
        self._on_device: tuple[torch.Tensor, ...] | None = None

    def set_rotation(self, rotation: Rotation) -> None:
        super().set_rotation(rotation)
        if self._on_device is not None:
            self._write_rotation(*self._on_device)

    def store_pages(self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor) -> None:
        from rl_accel.kernels.kv_int4 import triton

        pages, layout = self.pages(kv_cache)
        order, shift_KC, factors_KC, _ = self._rotation(key)
        if self.settings.balance:
            key = key * factors_KC
        triton.store(pages, layout, slots, key[: len(slots)], value[: len(slots)], order, shift_KC)

    def attend_pages(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: Any, output: torch.Tensor) -> None:
        from rl_accel.kernels.kv_int4 import triton

        pages, layout = self.pages(kv_cache)
        order, _, _, factors_HC = self._rotation(query)
        query = query[: metadata.num_actual_tokens]
        triton.attend_batch(
            output[: metadata.num_actual_tokens],
            query * factors_HC if self.settings.balance else query,
            pages,
            layout,
            metadata.block_table,
            metadata.query_start_loc,
            metadata.seq_lens,
            self.scale,
            order,
            max_seq_len=metadata.max_seq_len,
        )

    def _rotation(self, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Order, shift and factors where kernels read them, on the device of `like`, factors of its dtype.

        Made at the first store, after the model is loaded: what is made while it loads would be given up with the
        weights when vLLM sleeps.
        """
        if self._on_device is None:
            device = like.device
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise NotLiveError("rl_accel.kvcache: a CUDA graph is captured before the first step without one")
            order = torch.empty(1, dtype=torch.int32, device=device)
            shift_KC = torch.empty(self.num_kv_heads, self.head_size, dtype=torch.float32, device=device)
            factors_KC = torch.empty(self.num_kv_heads, self.head_size, dtype=like.dtype, device=device)
            factors_HC = torch.empty(self.num_heads, self.head_size, dtype=like.dtype, device=device)
            self._on_device = order, shift_KC, factors_KC, factors_HC
            self._write_rotation(*self._on_device)
        return self._on_device

    def _write_rotation(self, order: torch.Tensor, shift: torch.Tensor, *factors: torch.Tensor) -> None:
        order.fill_(self.rotation.order)
        shift.zero_() if self.rotation.shift_KC is None else shift.copy_(self.rotation.shift_KC)
        for target, found in zip(factors, self.factors(factors[0]), strict=True):
            target.fill_(1.0) if found is None else target.copy_(found)
