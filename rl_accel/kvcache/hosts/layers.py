"""What an attention layer with quantized pages does, whatever backend of vLLM it stands in.

Keys and values are stored first and everything is read back from pages, the step's own tokens too, by one kernel for
all query lengths: a page is a function of the text alone. Layers named in vLLM's `kv_cache_dtype_skip_layers` hold 8
bits, all others 4.

Host symbols: `AttentionImpl.__init__`'s arguments (v1/attention/backend.py); `Attention` and its `impl`,
`attn_backend` (model_executor/layers/attention/attention.py).

Shape suffixes: N tokens, H query heads, K KV heads, C head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from rl_accel.errors import NotLiveError
from rl_accel.kernels.kv_int4 import api
from rl_accel.kernels.kv_int4.layout import LANES, PageLayout
from rl_accel.kernels.kv_int4.reference import rotate
from rl_accel.kvcache.config import DTYPE, MAX_ORDER
from rl_accel.kvcache.hosts.register import settings_of
from rl_accel.kvcache.policies import MAX_HEAD_SIZE
from rl_accel.kvcache.rotation import Rotation


def token_bytes(head_size: int, bits: int) -> int:
    """Return the bytes of K and V of a token of one head."""
    return PageLayout(LANES, head_size, bits).token_bytes


class QuantizedPages:
    """Mixed into vLLM's `AttentionImpl`: reads and writes the pages of one layer, of 4 bits, or of 8 in the layers that
    vLLM was told to skip."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """As vLLM's.

        Raises:
            NotLiveError: for attention that quantized pages do not serve.
            KVCacheError: for an order that does not fit the head size.
        """
        from vllm.config import get_current_vllm_config

        refuse(head_size, alibi_slopes, sliding_window, logits_soft_cap, attn_type, sinks, kv_sharing_target_layer_name)
        self.settings = settings_of(get_current_vllm_config())
        if self.settings.order:
            api.check_order(self.settings.order, head_size)
        self.num_heads, self.head_size, self.num_kv_heads, self.scale = num_heads, head_size, num_kv_heads, float(scale)
        self.kv_cache_dtype, self.attn_type, self.sliding_window = kv_cache_dtype, attn_type, -1
        self.bits = 4 if kv_cache_dtype == DTYPE else 8
        # Until the policy's weights have been measured.
        self.rotation = Rotation(self.settings.order or min(head_size & -head_size, MAX_ORDER))
        self.measured: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        """Where K and Q of a forward without metadata go, while they are measured."""
        self._pages: tuple[int, torch.Tensor, PageLayout] | None = None
        self._factors: tuple[torch.Tensor | None, torch.Tensor | None] | None = None

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        self.store_pages(key, value, kv_cache, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("quantized outputs of attention")
        if attn_metadata is not None:
            self.attend_pages(query, kv_cache, attn_metadata, output)
        elif self.measured is not None:
            self.measure(query, key, value, output)
        else:
            output.zero_()  # while vLLM warms up and measures memory
        return output

    def set_rotation(self, rotation: Rotation) -> None:
        """What K is stored with from now on; pages that hold K already must be given up."""
        self.rotation, self._factors = rotation, None

    def factors(self, query: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return what K, [K, C], and queries, [H, C], are multiplied by, of the dtype and device of queries."""
        if self._factors is None:
            found = self.rotation.key_factors(query.dtype), self.rotation.query_factors(self.num_heads, query.dtype)
            self._factors = tuple(None if x is None else x.to(query.device) for x in found)  # type: ignore[assignment]
        return self._factors  # type: ignore[return-value]

    def pages(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, PageLayout]:
        """Return a layer's cache, uint8 [blocks, K, block size, bytes of a token], as pages, and what is in them."""
        if self._pages is None or self._pages[0] != kv_cache.data_ptr():
            num_blocks, num_heads, block_size, _ = kv_cache.shape
            layout = PageLayout(block_size, self.head_size, self.bits)
            self._pages = kv_cache.data_ptr(), kv_cache.view(num_blocks, num_heads, -1), layout
        return self._pages[1:]

    def store_pages(self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor) -> None:
        """Write K and V, [N, K, C], to their slots."""
        pages, layout = self.pages(kv_cache)
        key, value = key[: len(slots)], value[: len(slots)]
        if (factors_KC := self.factors(key)[0]) is not None:
            key = key * factors_KC
        if self.settings.rotate_v:
            value = rotate(value, self.rotation.order).to(value.dtype)
        api.store(pages, layout, slots, key, value, self.rotation.order, self.rotation.shift_KC)

    def attend_pages(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: Any, output: torch.Tensor) -> None:
        """Write causal attention of the queries [N, H, C] over everything in the pages to `output` [N, H, C]."""
        pages, layout = self.pages(kv_cache)
        num_tokens = metadata.num_actual_tokens
        query, output = query[:num_tokens], output[:num_tokens]
        if (factors_HC := self.factors(query)[1]) is not None:
            query = query * factors_HC
        api.attend(
            query,
            pages,
            layout,
            metadata.block_table,
            metadata.query_start_loc,
            metadata.seq_lens,
            self.scale,
            self.rotation.order,
            out=output,
        )
        if self.settings.rotate_v:
            output.copy_(rotate(output, self.rotation.order))

    def measure(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor) -> None:
        """Keep K and Q of one text, and write exact attention over it."""
        assert self.measured is not None
        self.measured.append((key.detach().float().clone(), query.detach().float().clone()))
        q, k, v = [x.transpose(0, 1)[None] for x in (query, key, value)]
        found = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=True
        )
        output.copy_(found[0].transpose(0, 1))


def refuse(
    head_size: int, alibi_slopes: Any, sliding_window: Any, logits_soft_cap: Any, attn_type: str, sinks: Any,
    kv_sharing_target_layer_name: Any,
) -> None:  # fmt: skip
    """Raise NotLiveError, by name, for attention that quantized pages do not serve."""
    for present, what in (
        (alibi_slopes is not None, "ALiBi"),
        (sliding_window not in (None, -1), "sliding windows"),
        (bool(logits_soft_cap), "soft-capped attention scores"),
        (sinks is not None, "attention sinks"),
        (attn_type != "decoder", f"{attn_type} attention, which is not causal"),
        (kv_sharing_target_layer_name is not None, "layers that share K and V"),
        (
            head_size % LANES != 0 or head_size > MAX_HEAD_SIZE,
            f"a head size of {head_size}, which is no multiple of {LANES} up to {MAX_HEAD_SIZE}",
        ),
    ):
        if present:
            raise NotLiveError(f"rl_accel.kvcache does not cover {what}, which this policy has; set enable=false")


def attention_layers(vllm_config: Any) -> Iterator[tuple[str, Any]]:
    """Every attention layer with a KV cache that has been built for this engine, drafters' included, by name."""
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        if hasattr(layer, "impl") and hasattr(layer, "get_attn_backend"):
            yield name, layer
