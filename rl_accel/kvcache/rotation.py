"""What a layer does to K before it is quantized, and to queries so that scores stay what they are.

    stored K = H((K * 2^-n) - shift)        query = H(Q * 2^n)        H: Hadamard transform of every `order` values

Each is chosen by K and Q of one text. Exponents n balance a dim's K against its queries: n = log2(rms K / rms Q) / 2
makes the product of their energies smallest, which the error of scores is proportional to (`orders.py`: the error of K
is the same in every dim). A rotation only spreads a dim that stands out over others; balancing takes it away, as far as
queries are small where K is large. Powers of two are exact in every float format. Balancing is left out where it would
save less than a tenth of the error.

Source: ours; the idea is SmoothQuant's for weights and activations (arXiv 2211.10438).

Shape suffixes: N tokens, K KV heads, H query heads, C head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rl_accel.kvcache.orders import allowed_orders, choose_order, choose_shift, order_errors

MAX_EXPONENT = 12
MIN_GAIN = 0.1
"""Share of the error of scores that balancing has to save."""


@dataclass(frozen=True)
class Rotation:
    """Of one layer."""

    order: int
    shift_KC: torch.Tensor | None = None
    """float32, less of K after it is balanced."""
    exponents_KC: torch.Tensor | None = None
    """int32; None: K is not balanced."""
    k_error: float = 0.0
    """Error of K as measured, of its norm."""

    def key_factors(self, dtype: torch.dtype) -> torch.Tensor | None:
        """Return 2^-n, [K, C]."""
        return None if self.exponents_KC is None else torch.exp2(-self.exponents_KC.float()).to(dtype)

    def query_factors(self, num_heads: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Return 2^n, [H, C], each KV head's for all its query heads."""
        if self.exponents_KC is None:
            return None
        factors_KC = torch.exp2(self.exponents_KC.float()).to(dtype)
        return factors_KC.repeat_interleave(num_heads // len(factors_KC), 0)


def choose_exponents(k_NKC: torch.Tensor, q_NHC: torch.Tensor) -> torch.Tensor:
    """Return the exponents that balance K against its queries, int32 [K, C], of mean near 0 in a head."""
    energies = []
    for x in (k_NKC, q_NHC):
        grouped = x.double().reshape(len(x), k_NKC.shape[1], -1, x.shape[-1])
        energy_KC = grouped.square().mean((0, 2))
        energies.append(energy_KC + 1e-12 * energy_KC.amax(-1, keepdim=True) + 1e-30)
    exponents_KC = 0.25 * (energies[0] / energies[1]).log2()
    exponents_KC = exponents_KC - exponents_KC.median(-1, keepdim=True).values
    return exponents_KC.round().clamp(-MAX_EXPONENT, MAX_EXPONENT).int()


def choose_rotation(
    k_NKC: torch.Tensor, q_NHC: torch.Tensor, bits: int, order: int = 0, shift: bool = False, balance: bool = True
) -> Rotation:
    """Choose by K and Q of a text, floats after RoPE.

    Args:
        order: 0: the one with the smallest error of K.

    Raises:
        KVCacheError: for K without tokens, or with values that are not finite.
    """
    plain = _choose(k_NKC, bits, order, shift, None)
    if not balance:
        return plain
    exponents_KC = choose_exponents(k_NKC, q_NHC)
    balanced = _choose(k_NKC, bits, order, shift, exponents_KC)
    errors = [_score_error(k_NKC, q_NHC, bits, rotation) for rotation in (plain, balanced)]
    return balanced if errors[1] < (1.0 - MIN_GAIN) * errors[0] else plain


def _choose(k_NKC: torch.Tensor, bits: int, order: int, shift: bool, exponents_KC: torch.Tensor | None) -> Rotation:
    if exponents_KC is not None:
        k_NKC = k_NKC.float() * torch.exp2(-exponents_KC.float())
    size = float(k_NKC.double().square().sum(-1).mean())
    shift_KC = choose_shift(k_NKC) if shift else None
    if shift_KC is not None:
        k_NKC = k_NKC.float() - shift_KC
    order = order or choose_order(k_NKC, allowed_orders(k_NKC.shape[-1]), bits)
    error = math.sqrt(order_errors(k_NKC, [order], bits)[order] / max(size, 1e-30))
    return Rotation(order, shift_KC, exponents_KC, error)


def _score_error(k_NKC: torch.Tensor, q_NHC: torch.Tensor, bits: int, rotation: Rotation) -> float:
    """Return the mean over heads of the error of K times the energy of queries."""
    total, num_kv_heads = 0.0, k_NKC.shape[1]
    for_k, for_q = rotation.key_factors(torch.float32), rotation.query_factors(q_NHC.shape[1], torch.float32)
    if for_k is not None and for_q is not None:
        k_NKC, q_NHC = k_NKC.float() * for_k, q_NHC.float() * for_q
    if rotation.shift_KC is not None:
        k_NKC = k_NKC.float() - rotation.shift_KC
    energy_K = q_NHC.double().reshape(len(q_NHC), num_kv_heads, -1).square().sum(-1).mean(0)
    for head in range(num_kv_heads):
        error = order_errors(k_NKC[:, head : head + 1], [rotation.order], bits)[rotation.order]
        total += error * float(energy_K[head])
    return total / num_kv_heads
