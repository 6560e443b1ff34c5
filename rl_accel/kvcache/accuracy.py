"""How far a quantized KV cache moves a policy: KL and more, teacher-forced over the policy's own samples.

A text goes through the model in one forward. K and V of all tokens go through the format first, and attention sees what
is read back, as with a cache that is stored to first: a page is a function of its tokens alone, so this gives what
decoding token by token gives. Everything is compared with the same policy and its K and V in float32.

`outliers` gives a policy without outliers in K some: it multiplies RoPE pairs of K by a power of two and divides those
of the queries, so that the policy is the same to the last bit and only a quantized K notices. These outliers are ours,
not a model's.

Left out: batches, models whose keys have no rows of their own to scale (fused QKV, latent attention), and rounding of
queries and probabilities, which `paged_log_probs` has. Cost: a forward per text and format.

Shape suffixes: T response tokens, V vocabulary, K KV heads, N tokens, C head size.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rl_accel.errors import KVCacheError
from rl_accel.kernels.kv_int4 import api
from rl_accel.kernels.kv_int4.layout import PageLayout
from rl_accel.kvcache.formats import KVFormat, standard_formats

COLUMNS = {"none": (0, 0), "1x16": (1, 4), "2x8": (2, 3), "4x8": (4, 3), "2x32": (2, 5)}
"""Outliers by name: RoPE pairs of every KV head, and the power of two that K of them is multiplied by."""
PAGES, QUERIES = "rl_accel_pages", "rl_accel_queries"
"""Names of attention functions."""


@dataclass(frozen=True)
class Sample:
    """A prompt and a response of the policy, token ids."""

    prompt: list[int]
    response: list[int]


@dataclass
class Divergence:
    """Sums over response tokens of how far a policy is from another."""

    tokens: int = 0
    kl: float = 0.0
    """Nats: KL of the other policy to this one, over the vocabulary."""
    same_top1: int = 0
    log_prob: float = 0.0
    """Nats: |log p' - log p| of the token taken."""
    moved: float = 0.0
    """Total variation: the probability that moved."""

    def add(self, base_TV: torch.Tensor, other_TV: torch.Tensor, taken_T: torch.Tensor) -> None:
        """Count tokens in; log-probs are float64."""
        self.tokens += len(taken_T)
        self.kl += float((base_TV.exp() * (base_TV - other_TV)).sum())
        self.same_top1 += int((base_TV.argmax(-1) == other_TV.argmax(-1)).sum())
        self.log_prob += float((base_TV - other_TV).gather(1, taken_T[:, None]).abs().sum())
        self.moved += float(0.5 * (base_TV.exp() - other_TV.exp()).abs().sum())

    def means(self) -> dict[str, float]:
        """Return the means over tokens."""
        sums = {"kl": self.kl, "top1": self.same_top1, "log_prob": self.log_prob, "total_variation": self.moved}
        return {name: value / max(self.tokens, 1) for name, value in sums.items()}


def summarize(draws: Sequence[Divergence]) -> dict[str, Any]:
    """Return means over draws, and `kl_error`, the standard error of that of `kl`; None of one draw."""
    means = [draw.means() for draw in draws]
    found: dict[str, Any] = {name: statistics.fmean(mean[name] for mean in means) for name in means[0]}
    spread = statistics.stdev(mean["kl"] for mean in means) if len(means) > 1 else None
    return found | {"kl_error": None if spread is None else spread / math.sqrt(len(means))}


def make_cache(kv_format: KVFormat) -> Any:
    """Return a cache for a forward of transformers whose update stores, then returns what is read back of all."""
    from transformers import DynamicCache

    class QuantizedCache(DynamicCache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            return super().update(*kv_format(key_states, value_states, layer_idx), layer_idx, *args, **kwargs)

    return QuantizedCache()


@torch.no_grad()
def log_probs(model: Any, sample: Sample, kv_format: KVFormat | None = None) -> torch.Tensor:
    """Return the log-probs of the response, float64 [T, V]; without a format no cache is used."""
    tokens = torch.tensor([sample.prompt + sample.response], device=model.device)
    cache = None if kv_format is None else make_cache(kv_format)
    logits = model(tokens, past_key_values=cache, use_cache=cache is not None).logits
    return logits[0, len(sample.prompt) - 1 : -1].double().log_softmax(-1)


@torch.no_grad()
def collect_keys(model: Any, samples: Sequence[Sample]) -> list[torch.Tensor]:
    """Return K of all tokens by layer, after RoPE, float32 [N, K, C]."""
    keys: list[list[torch.Tensor]] = []
    for sample in samples:
        cache = make_cache(lambda k, v, layer: (k, v))
        model(torch.tensor([sample.prompt + sample.response], device=model.device), past_key_values=cache)
        keys.append([layer.keys[0].transpose(0, 1) for layer in cache.layers])
    return [torch.cat(parts) for parts in zip(*keys, strict=True)]


@torch.no_grad()
def collect_queries(model: Any, samples: Sequence[Sample]) -> list[torch.Tensor]:
    """Return Q of all tokens by layer, after RoPE, float32 [N, H, C]."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found: dict[int, list[torch.Tensor]] = {}
    before = model.config._attn_implementation

    def attend(module, query, *args, **kwargs):
        found.setdefault(module.layer_idx, []).append(query[0].transpose(0, 1).float())
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[QUERIES] = attend
    model.config._attn_implementation = QUERIES
    try:
        for sample in samples:
            model(torch.tensor([sample.prompt + sample.response], device=model.device), use_cache=False)
    finally:
        model.config._attn_implementation = before
    return [torch.cat(found[layer]) for layer in sorted(found)]


@torch.no_grad()
def draw_samples(
    model: Any, prompts: Sequence[Sequence[int]], per_prompt: int, max_tokens: int, seed: int, batch_size: int = 64
) -> list[Sample]:
    """Sample responses of the policy at temperature 1, with its end of text if it came to it."""
    end = model.generation_config.eos_token_id
    ends = set(end if isinstance(end, list) else [] if end is None else [end])
    torch.manual_seed(seed)
    rows = [list(prompt) for prompt in prompts for _ in range(per_prompt)]
    samples = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=model.device)
        found = model.generate(
            ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_tokens,
            pad_token_id=next(iter(ends), 0),
        )  # fmt: skip
        for row, response in zip(batch, found[:, width:].tolist(), strict=True):
            length = next((i + 1 for i, token in enumerate(response) if token in ends), len(response))
            samples.append(Sample(row, response[:length]))
    return samples


@contextlib.contextmanager
def outliers(model: Any, num_pairs: int, exponent: int, seed: int = 0) -> Iterator[None]:
    """Multiply K of `num_pairs` RoPE pairs of every KV head by 2^exponent, divide those of its queries, undo at exit.

    RoPE turns dim i with dim i + C / 2, so both are scaled alike and their products with queries stay what they were,
    bit for bit. A norm over a head (Qwen3's `k_norm`) would take the factor away, so there it goes into the norm's
    weight, which the heads of a layer share: these models have the same pairs in all heads of a layer.

    Raises:
        KVCacheError: for a model that this cannot be done to exactly.
    """
    config = model.config.get_text_config()
    if getattr(config, "partial_rotary_factor", None) not in (None, 1.0):
        raise KVCacheError("outliers are injected into models whose RoPE turns the whole head")
    generator = torch.Generator().manual_seed(seed)
    factor, scaled = 2.0**exponent, []
    for layer in model.get_decoder().layers if num_pairs else ():
        attention = layer.self_attn
        for rows, tensor, is_key in _scalable(attention, config, num_pairs, generator):
            scaled.append((tensor, rows.to(tensor.device), factor if is_key else 1 / factor))
    for tensor, rows, by in scaled:
        tensor.data[rows] *= by
    try:
        yield
    finally:
        for tensor, rows, by in scaled:
            tensor.data[rows] /= by


def _scalable(
    attention: Any, config: Any, num_pairs: int, generator: torch.Generator
) -> list[tuple[torch.Tensor, torch.Tensor, bool]]:
    """Return (rows, tensor, whether it is of K) of an attention layer, to be multiplied or divided."""
    if not all(hasattr(attention, name) for name in ("k_proj", "q_proj")):
        raise KVCacheError(f"outliers cannot be injected into {type(attention).__name__}: no k_proj and q_proj")
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    groups = config.num_attention_heads // config.num_key_value_heads

    def draw() -> torch.Tensor:
        pairs = torch.randperm(head_size // 2, generator=generator)[:num_pairs]
        return torch.cat([pairs, pairs + head_size // 2])

    if hasattr(attention, "k_norm"):
        norms = attention.k_norm.weight, attention.q_norm.weight
        if any(norm.shape != (head_size,) for norm in norms) or "Gemma" in type(attention).__name__:
            raise KVCacheError("outliers are injected into norms of K whose weight is a factor of one head")
        rows = draw()
        return [(rows, norms[0], True), (rows, norms[1], False)]
    parts = []
    for head in range(config.num_key_value_heads):
        rows = draw()
        for projection, heads, is_key in (
            (attention.k_proj, [head], True),
            (attention.q_proj, range(head * groups, (head + 1) * groups), False),
        ):
            everywhere = torch.cat([h * head_size + rows for h in heads])
            tensors = [projection.weight] if projection.bias is None else [projection.weight, projection.bias]
            parts += [(everywhere, tensor, is_key) for tensor in tensors]
    return parts


def measure(
    model: Any,
    samples: Sequence[Sample],
    calibration: Sequence[Sample],
    column: str,
    rows: Sequence[str] | None = None,
    draws: int = 1,
) -> dict[str, list[Divergence]]:
    """Return how far each format moves the policy, by row: a divergence for each draw of texts and outliers.

    Args:
        model: a causal language model of transformers, float32, in eval mode.
        samples: are dealt out to draws.
        calibration: other samples, for shifts and orders.
        column: of `COLUMNS`.
        rows: of `formats.standard_formats`; None: all.
        draws: of the pairs that become outliers, with seeds 0, 1, ..., as KL depends much on which they are.

    Raises:
        KVCacheError: for an unknown column or row, fewer texts than draws, a model whose attention left the cache
            unused, or outliers that changed the policy.
    """
    if column not in COLUMNS:
        raise KVCacheError(f"column {column!r} is unknown; known: {', '.join(COLUMNS)}")
    if not 1 <= draws <= len(samples):
        raise KVCacheError(f"each draw needs a text: got {draws} draws and {len(samples)} texts")
    results: dict[str, list[Divergence]] = {}
    for seed in range(draws):
        dealt = samples[seed::draws]
        originals = [_digest(log_probs(model, sample)) for sample in dealt]
        with outliers(model, *COLUMNS[column], seed):
            known = standard_formats(collect_keys(model, calibration), collect_queries(model, calibration))
            if unknown := set(rows or ()) - known.keys():
                raise KVCacheError(f"rows {sorted(unknown)} are unknown; known: {', '.join(known)}")
            found = {name: Divergence() for name in rows or known}
            for sample, original in zip(dealt, originals, strict=True):
                base_TV = log_probs(model, sample)
                if _digest(base_TV) != original:
                    raise KVCacheError(f"outliers {column} changed the policy, so they are not exact for this model")
                taken_T = torch.tensor(sample.response, device=model.device)
                for name, divergence in found.items():
                    divergence.add(base_TV, log_probs(model, sample, known[name]), taken_T)
        for name, divergence in found.items():
            if name != "none" and divergence.kl == 0.0:
                raise KVCacheError(f"{name} changed nothing: does this model's attention use the cache?")
            results.setdefault(name, []).append(divergence)
    return results


def _digest(x: torch.Tensor) -> bytes:
    return hashlib.sha256(x.cpu().numpy().tobytes()).digest()


@torch.no_grad()
def paged_log_probs(model: Any, sample: Sample, order: int, layer_bits: Sequence[int], backend: str) -> torch.Tensor:
    """Return the log-probs of a response with attention over real pages, every rounding of the kernels included.

    Args:
        model: its attention implementation is replaced for the call.
        layer_bits: of the codes, by layer.
        backend: of kernels/kv_int4.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(module, query, key, value, attention_mask, scaling=None, **_):
        num_tokens, head_size = query.shape[2:]
        layout = PageLayout(16, head_size, layer_bits[module.layer_idx])
        num_blocks = math.ceil(num_tokens / layout.block_size)
        pages = torch.zeros(num_blocks, key.shape[1], layout.page_bytes, dtype=torch.uint8, device=key.device)
        k_NKC, v_NKC, q_NHC = (x[0].transpose(0, 1).contiguous() for x in (key, value, query))
        ints = {"dtype": torch.int32, "device": key.device}
        api.store(pages, layout, torch.arange(num_tokens, device=key.device), k_NKC, v_NKC, order, backend=backend)
        out = api.attend(
            q_NHC, pages, layout, torch.arange(num_blocks, **ints)[None], torch.tensor([0, num_tokens], **ints),
            torch.tensor([num_tokens], **ints), scaling, order, backend=backend,
        )  # fmt: skip
        return out[None], None

    ALL_ATTENTION_FUNCTIONS[PAGES] = attend
    before = model.config._attn_implementation
    model.config._attn_implementation = PAGES
    try:
        return log_probs(model, sample)
    finally:
        model.config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[PAGES]
