"""What attention reads back from a KV cache, by format: ours, and those of vLLM that it is compared with, emulated.

A format maps K and V of a layer to the values that its pages stand for. Rounding of queries and of probabilities is
left out (1e-4 of the outputs for ours: `accuracy.paged_log_probs` has it). vLLM's formats get float32 K and V, as ours;
an engine in bfloat16 rounds them before, and vLLM's rotation on CUDA goes through bfloat16 (hadacore).

Shape suffixes: B batch, K KV heads, T tokens, C head size, N tokens of a calibration batch. Costs: memory of a few K.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rl_accel.kernels.common.hadamard import hadamard
from rl_accel.kernels.kv_int4.reference import quantize, rotate
from rl_accel.kvcache.orders import allowed_orders, choose_order, choose_shift
from rl_accel.kvcache.rotation import choose_rotation

KVFormat = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""(K [B, K, T, C], V, layer) -> what is read of them, float32."""

OURS = "int4.auto.balance.layer0_int8"
"""The default setting: dims of K balanced, orders measured, V as it is, layer 0 with 8 bits."""
OURS_INT4 = "int4.auto.balance"
"""The same with 4 bits in all layers."""
INCUMBENT = "int4_per_token_head"

SIGN_SEED = 0x9E3779B9
FP8_MAX = 448.0


@dataclass(frozen=True)
class PagedFormat:
    """Ours: kernels/kv_int4."""

    k_orders: Sequence[int]
    """By layer; the last one also for layers behind."""
    v_order: int = 1
    shifts_KC: Sequence[torch.Tensor] | None = None
    """By layer."""
    exponents_KC: Sequence[torch.Tensor | None] | None = None
    """By layer: powers of two that K is divided by before (`rotation.py`)."""
    bits: int = 4
    first_layer_bits: int | None = 4
    """Of layer 0; None: it is not quantized."""

    def __call__(self, k_BKTC: torch.Tensor, v_BKTC: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        bits = self.bits if layer else self.first_layer_bits
        if bits is None:
            return k_BKTC, v_BKTC
        order = self.k_orders[min(layer, len(self.k_orders) - 1)]
        exponents_KC = None if self.exponents_KC is None else self.exponents_KC[layer]
        factor_K1C = 1.0 if exponents_KC is None else torch.exp2(exponents_KC.float())[:, None]
        shift_K1C = 0.0 if self.shifts_KC is None else self.shifts_KC[layer][:, None]
        k_BKTC = (read_back(k_BKTC / factor_K1C - shift_K1C, bits, order) + shift_K1C) * factor_K1C
        return k_BKTC, read_back(v_BKTC, bits, self.v_order)


def read_back(x: torch.Tensor, bits: int, order: int) -> torch.Tensor:
    """Return what pages hold of floats [..., C], rotated back, float32."""
    codes, scales, offsets = quantize(rotate(x, order), (1 << bits) - 1)
    return rotate(codes.float() * scales.float()[..., None] + offsets.float()[..., None], order)


@functools.cache
def _signs(head_size: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SIGN_SEED)
    return (2.0 * torch.bernoulli(torch.full((head_size,), 0.5), generator=generator) - 1.0).to(device)


def vllm_int4(x: torch.Tensor) -> torch.Tensor:
    """Return what vLLM's `int4_per_token_head` holds of floats [..., C], rotated back, float32.

    Random signs and a Hadamard transform of the whole head, an integer zero point within 0 .. 15 that takes the lowest
    four bits of the mantissa of a float32 scale. Source: vllm/v1/attention/ops/int4_per_token_head.py of vLLM 0.28.

    Raises:
        ValueError: if the head size is not a power of two.
    """
    head_size = x.shape[-1]
    signs_C = _signs(head_size, str(x.device))
    rotated = hadamard(x.float() * signs_C, head_size)
    low, high = rotated.amin(-1, keepdim=True), rotated.amax(-1, keepdim=True)
    scale = ((high - low) / 15.0).clamp_min(1e-6)
    zero_point = torch.floor(-low / scale + 0.5).clamp(0, 15)
    codes = torch.floor(rotated * (1.0 / scale) + zero_point + 0.5).clamp(0, 15)
    stored_scale = (scale.view(torch.int32) & -16).view(torch.float32)
    return hadamard((codes - zero_point) * stored_scale, head_size) / head_size * signs_C


def vllm_int8(x: torch.Tensor) -> torch.Tensor:
    """Return what vLLM's `int8_per_token_head` holds of floats [..., C]: symmetric, a float32 scale, not rotated."""
    scale = (x.float().abs().amax(-1, keepdim=True) / 127.0).clamp_min(1e-6)
    scaled = x.float() * (1.0 / scale)
    return torch.trunc(scaled + torch.where(scaled >= 0, 0.5, -0.5)).clamp(-128, 127) * scale


def vllm_fp8(x: torch.Tensor) -> torch.Tensor:
    """Return floats as float8 e4m3 with scale 1, saturated."""
    return x.float().clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()


def both(read: Callable[[torch.Tensor], torch.Tensor], skip_first_layer: bool = False) -> KVFormat:
    """Return the format that reads K and V alike; `skip_first_layer`: all but layer 0's, which stay float32."""
    return lambda k, v, layer: (k, v) if skip_first_layer and layer == 0 else (read(k), read(v))


def measured_format(
    keys_NKC: Sequence[torch.Tensor], queries_NHC: Sequence[torch.Tensor], first_layer_bits: int | None, **choice: bool
) -> PagedFormat:
    """Return what the engine would choose by K and Q of a calibration batch, by layer."""
    found = [choose_rotation(k, q, 4, **choice) for k, q in zip(keys_NKC, queries_NHC, strict=True)]
    return PagedFormat(
        [rotation.order for rotation in found],
        shifts_KC=[r.shift_KC for r in found if r.shift_KC is not None] or None,
        exponents_KC=[rotation.exponents_KC for rotation in found],
        first_layer_bits=first_layer_bits,
    )


def standard_formats(keys_NKC: Sequence[torch.Tensor], queries_NHC: Sequence[torch.Tensor]) -> dict[str, KVFormat]:
    """Return the rows of the comparison by name.

    Args:
        keys_NKC, queries_NHC: K and Q of a calibration batch by layer, floats, for what is learned.
    """
    head_size = keys_NKC[0].shape[-1]
    orders = allowed_orders(head_size)
    shifts_KC = [choose_shift(k) for k in keys_NKC]
    auto = [choose_order(k, orders) for k in keys_NKC]
    auto_shifted = [choose_order(k - shift, orders) for k, shift in zip(keys_NKC, shifts_KC, strict=True)]
    rows: dict[str, KVFormat] = {
        "none": lambda k, v, layer: (k, v),
        "bf16": both(lambda x: x.bfloat16().float()),
        "int8_per_token_head": both(vllm_int8),
        "fp8": both(vllm_fp8),
    }
    if head_size & (head_size - 1) == 0:
        rows[INCUMBENT] = both(vllm_int4)
        rows[f"{INCUMBENT}.layer0_exact"] = both(vllm_int4, skip_first_layer=True)
    rows["int4.plain"] = PagedFormat([1])
    for order in orders:
        rows[f"int4.k{order}"] = PagedFormat([order])
        rows[f"int4.k{order}.shift"] = PagedFormat([order], shifts_KC=shifts_KC)
    rows[f"int4.k{orders[0]}_v{orders[0]}"] = PagedFormat([orders[0]], v_order=orders[0])
    rows[f"int4.k{orders[-1]}_v{orders[-1]}"] = PagedFormat([orders[-1]], v_order=orders[-1])
    rows["int4.auto"] = PagedFormat(auto)
    rows["int4.auto.shift"] = PagedFormat(auto_shifted, shifts_KC=shifts_KC)
    rows["int4.k16.layer0_exact"] = PagedFormat([orders[0]], first_layer_bits=None)
    rows["int4.k16.layer0_int8"] = PagedFormat([orders[0]], first_layer_bits=8)
    rows["int4.auto.balance"] = measured_format(keys_NKC, queries_NHC, 4)
    rows[OURS] = measured_format(keys_NKC, queries_NHC, 8)
    rows["int4.auto.balance.shift.layer0_int8"] = measured_format(keys_NKC, queries_NHC, 8, shift=True)
    rows["int4.auto.shift.layer0_int8"] = PagedFormat(auto_shifted, shifts_KC=shifts_KC, first_layer_bits=8)
    rows["int8.k16"] = PagedFormat([orders[0]], bits=8, first_layer_bits=8)
    return rows
