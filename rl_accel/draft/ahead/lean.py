"""Language models as a drafter needs them: one row, a key-value cache that can be cut back, logits of the last token.

transformers takes 0.85 ms for a token of a model of two layers and 0.28 M parameters, nearly all of it Python. Models
of the Llama shape (Llama, Qwen2, Qwen3, Mistral) are computed here with a quarter of the calls: projections in one
product, rotary embedding as one complex product. `model_of` takes that form only where it gives the same logits.
Left out: sliding windows, rotary embeddings that change with the length, experts.

Shape suffixes: T new tokens, S tokens with those before, H hidden, N heads of queries and keys, D half a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu
from transformers import DynamicCache, PreTrainedModel

FIXED_ROPES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding that do not depend on how long a text is."""
FIRST_ROOM = 256
"""Tokens that a cache has room for at first."""
TRIAL = (12, 1, 1, 3)
"""Tokens of the passes that are compared with transformers."""
MAX_DIFFERENCE = 1e-3
"""Between logits, as a share of the largest."""


class Cache(Protocol):
    """What a model keeps of a text."""

    length: int
    """Tokens that are in it."""

    def cut(self, length: int) -> None:
        """Forget what is behind so many tokens; `length` is smaller afterwards if that cannot be done."""


class Model(Protocol):
    """A language model."""

    vocab_size: int
    max_length: int
    """Longest text, in tokens."""

    def new_cache(self) -> Cache:
        """Return a cache without tokens."""

    def logits(self, ids: Sequence[int], cache: Any) -> torch.Tensor:
        """Return float32 [V], for the token behind `ids`, which follow what is in the cache and are in it then."""


class StockCache:
    """transformers' own."""

    def __init__(self, config: Any):
        self._config = config
        self.stock, self.length = DynamicCache(config=config), 0

    def cut(self, length: int) -> None:
        """As `Cache.cut`."""
        if self.length > length:
            try:
                self.stock.crop(length)
                self.length = length
            except ValueError:  # a sliding window has let go what is needed
                self.stock, self.length = DynamicCache(config=self._config), 0


class StockModel:
    """Computed by transformers."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.vocab_size = int(model.config.vocab_size)
        self.max_length = int(getattr(model.config, "max_position_embeddings", 0) or 1 << 30)

    def new_cache(self) -> StockCache:
        """As `Model.new_cache`."""
        return StockCache(self.model.config)

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], cache: StockCache) -> torch.Tensor:
        """As `Model.logits`."""
        found = self.model(torch.tensor([ids]), past_key_values=cache.stock, use_cache=True, logits_to_keep=1)
        cache.length += len(ids)
        return found.logits[0, -1].float()


class LeanCache:
    """Keys and values of all layers, with room to grow."""

    def __init__(self, num_layers: int, num_heads: int, head_size: int):
        self.length = 0
        self._shape = (num_layers, 2, num_heads, FIRST_ROOM, head_size)
        self.keys_values = torch.empty(self._shape)

    def cut(self, length: int) -> None:
        """As `Cache.cut`."""
        self.length = min(self.length, length)

    def make_room(self, length: int) -> None:
        """Grow to so many tokens."""
        room = self.keys_values.shape[3]
        if length > room:
            grown = torch.empty(*self._shape[:3], max(2 * room, length), self._shape[4])
            grown[:, :, :, : self.length] = self.keys_values[:, :, :, : self.length]
            self.keys_values = grown


class LeanModel:
    """The Llama shape. Weights are taken in float32."""

    def __init__(self, model: PreTrainedModel):
        """
        Raises:
            ValueError, AttributeError: for a model of another shape.
        """
        config, inner = model.config, model.model
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type", "default") not in FIXED_ROPES or config.hidden_act != "silu":
            raise ValueError("another rotary embedding or activation")
        if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
            raise ValueError("attention in a window")
        self.vocab_size, self.max_length = int(config.vocab_size), int(config.max_position_embeddings)
        attention = inner.layers[0].self_attn
        self.head_size = int(attention.head_dim)
        self.num_keys = int(config.num_key_value_heads)
        self.num_queries = int(config.num_attention_heads)
        self.scaling = float(attention.scaling)
        self._embed, self._norm, self._head = inner.embed_tokens.weight, inner.norm, model.get_output_embeddings()
        self._layers = [self._layer(layer) for layer in inner.layers]
        cos, sin = inner.rotary_emb(self._embed[:1, None], torch.arange(self.max_length)[None])
        half = self.head_size // 2
        self._turns_SD = torch.complex(cos[0, :, :half].float(), sin[0, :, :half].float())[:, None].contiguous()

    def _layer(self, layer: Any) -> tuple[Any, ...]:
        """Return the layer's weights, with the halves of queries and keys interleaved: scores stay the same."""
        own = layer.self_attn
        queries, keys, values = own.q_proj, own.k_proj, own.v_proj
        weight = torch.cat([self._pairs(queries.weight), self._pairs(keys.weight), values.weight])
        bias = None
        if queries.bias is not None:
            bias = torch.cat([self._pairs(queries.bias), self._pairs(keys.bias), values.bias])
        norms = None
        if getattr(own, "q_norm", None) is not None:
            norms = [(self._pairs(norm.weight), norm.variance_epsilon) for norm in (own.q_norm, own.k_norm)]
        before, behind, mlp = layer.input_layernorm, layer.post_attention_layernorm, layer.mlp
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        biases = [own.o_proj.bias, mlp.gate_proj.bias, mlp.up_proj.bias, mlp.down_proj.bias]
        if any(b is not None for b in biases):
            raise ValueError("biases that are not the projections' of attention")
        out, down = own.o_proj.weight.T, mlp.down_proj.weight.T
        return before.weight, before.variance_epsilon, weight, bias, norms, out, behind.weight, gate_up, down

    def _pairs(self, rows: torch.Tensor) -> torch.Tensor:
        """Put row i of a head beside row i + D."""
        heads = rows.unflatten(0, (-1, 2, self.head_size // 2))
        return heads.transpose(1, 2).reshape(rows.shape)

    def new_cache(self) -> LeanCache:
        """As `Model.new_cache`."""
        return LeanCache(len(self._layers), self.num_keys, self.head_size)

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], cache: LeanCache) -> torch.Tensor:
        """As `Model.logits`."""
        start, end = cache.length, cache.length + len(ids)
        cache.make_room(end)
        x_TH = self._embed[torch.tensor(ids)]
        turns_TD = self._turns_SD[start:end]
        mask_TS = None
        if len(ids) > 1:
            mask_TS = torch.ones(len(ids), end, dtype=torch.bool).tril_(start)
        num_rotated = self.num_queries + self.num_keys
        shape = (len(ids), num_rotated + self.num_keys, self.head_size)
        grouped = self.num_queries != self.num_keys
        for keys_values, (norm, eps, weight, bias, norms, out, norm2, gate_up, down) in zip(
            cache.keys_values, self._layers, strict=True
        ):
            all_TN = linear(rms_norm(x_TH, norm.shape, norm, eps), weight, bias).view(shape)
            rotated = all_TN[:, :num_rotated]
            if norms is not None:
                parts = rotated.split((self.num_queries, self.num_keys), 1)
                rotated = torch.cat(
                    [rms_norm(part, w.shape, w, e) for part, (w, e) in zip(parts, norms, strict=True)], 1
                )
            pairs = torch.view_as_complex(rotated.unflatten(-1, (-1, 2))) * turns_TD
            rotated = torch.view_as_real(pairs).view(len(ids), num_rotated, self.head_size)
            keys_values[0, :, start:end] = rotated[:, self.num_queries :].transpose(0, 1)
            keys_values[1, :, start:end] = all_TN[:, num_rotated:].transpose(0, 1)
            keys, values = keys_values[:, None, :, :end]
            seen = scaled_dot_product_attention(
                rotated[None, :, : self.num_queries].transpose(1, 2), keys, values, mask_TS, scale=self.scaling,
                enable_gqa=grouped,
            )  # fmt: skip
            x_TH = torch.addmm(x_TH, seen[0].transpose(0, 1).reshape(len(ids), -1), out)
            gate, up = linear(rms_norm(x_TH, norm2.shape, norm2, eps), gate_up).chunk(2, -1)
            x_TH = torch.addmm(x_TH, silu(gate) * up, down)
        cache.length = end
        last = rms_norm(x_TH[-1], self._norm.weight.shape, self._norm.weight, self._norm.variance_epsilon)
        return linear(last, self._head.weight, self._head.bias)


def model_of(model: PreTrainedModel) -> Model:
    """Return the lean form of a model if there is one that gives its logits, else transformers'."""
    stock = StockModel(model)
    try:
        lean = LeanModel(model)
    except (ValueError, AttributeError, TypeError):
        return stock
    generator = torch.Generator().manual_seed(0)
    lean_cache, stock_cache = lean.new_cache(), stock.new_cache()
    for count in TRIAL:
        ids = torch.randint(stock.vocab_size, (count,), generator=generator).tolist()
        ours, theirs = lean.logits(ids, lean_cache), stock.logits(ids, stock_cache)
        if not (ours - theirs).abs().max() <= MAX_DIFFERENCE * theirs.abs().max():
            return stock
    return lean
