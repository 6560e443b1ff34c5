"""exp and SiLU of float32 in PyTorch, the same bits as the kernels': one specification for every operation.

exp is 2^n times a polynomial, one rounding an operation; n ln 2 is taken off in two steps. Within two units in the last
place. Source: the terms are Cephes' expf.
"""

from __future__ import annotations

import torch

LOG2E, LN2_HIGH, LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4
EXP_TERMS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
MIN_EXPONENT = -87.0
"""Below, the result is 0: normal numbers only, so that flushing of subnormal ones changes nothing."""


def exp_neg(x: torch.Tensor) -> torch.Tensor:
    """Return exp(x) of float32 values <= 0; NaN stays NaN."""
    n = torch.floor(x * LOG2E + 0.5)
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    y = torch.full_like(x, EXP_TERMS[0])
    for term in EXP_TERMS[1:]:
        y = y * r + term
    y = (y * (r * r) + r) + 1.0
    found = torch.ldexp(y, n.clamp(min=-126.0).nan_to_num(0.0).int())
    return torch.where(x < MIN_EXPONENT, torch.zeros_like(x), found)


def silu(x: torch.Tensor) -> torch.Tensor:
    """Return x / (1 + exp(-x)) of float32, by exp(-|x|), which cannot overflow."""
    e = exp_neg(-x.abs())
    return torch.where(x < 0, x * e, x) / (e + 1.0)
