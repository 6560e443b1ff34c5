"""Base quantizers: what stands at the position of the codes. Each maps float32 [E, N, K] to a `QuantizedMatrix`.

Every decision is taken per group, never per tensor, so codes do not depend on what is stacked or sharded together.

    rtn   range of the group, rounding to nearest
    hqq   scale from the range, offset refined by half-quadratic splitting with an l_p norm, p = 0.7 (HQQ; Badri and
          Shaji 2023); differs: stops per group, not per tensor
    ls    scale and offset by least squares given codes, codes by rounding, in turn (ours; `kernels/moe_int3`)

Cost per weight on one core: rtn 1, hqq about 20 passes in PyTorch; ls one pass in C++.
"""

from __future__ import annotations

import torch

from rl_accel.kernels.moe_int3 import api, reference
from rl_accel.kernels.moe_int3.layout import QuantizedMatrix

LS_ITERATIONS = 10
HQQ_ITERATIONS, HQQ_BETA, HQQ_KAPPA, HQQ_P = 20, 10.0, 1.01, 0.7


def rtn(w_ENK: torch.Tensor, bits: int, group_size: int) -> QuantizedMatrix:
    x, scale, low = _range(w_ENK, bits, group_size)
    return _pack(x, scale, low, w_ENK, bits, group_size)


def hqq(w_ENK: torch.Tensor, bits: int, group_size: int) -> QuantizedMatrix:
    x, scale, offset = _range(w_ENK, bits, group_size)
    best, best_error, beta = offset, torch.full_like(offset, torch.inf), HQQ_BETA
    for _ in range(HQQ_ITERATIONS):
        q = ((x - offset) / scale).round().clamp(0, (1 << bits) - 1)
        residual = x - (q * scale + offset)
        error = residual.abs().mean(-1, keepdim=True)
        better = error < best_error
        best, best_error = torch.where(better, offset, best), torch.where(better, error, best_error)
        shrunk = residual.abs() - residual.abs().clamp(min=1e-12).pow(HQQ_P - 1) / beta
        sparse = residual.sign() * shrunk.clamp(min=0)
        offset, beta = (x - sparse - q * scale).mean(-1, keepdim=True), beta * HQQ_KAPPA
    return _pack(x, scale, best, w_ENK, bits, group_size)


def ls(w_ENK: torch.Tensor, bits: int, group_size: int) -> QuantizedMatrix:
    return api.quantize(w_ENK, bits, group_size, LS_ITERATIONS)


BASES = {"rtn": rtn, "hqq": hqq, "ls": ls}


def _range(w_ENK: torch.Tensor, bits: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = w_ENK.unflatten(-1, (-1, group_size))
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    return x, ((high - low) / ((1 << bits) - 1)).clamp(min=1e-8), low


def _pack(x, scale, offset, w_ENK: torch.Tensor, bits: int, group_size: int) -> QuantizedMatrix:
    scale, offset = scale.half(), offset.half()
    safe = scale.float().clamp(min=6e-8)
    q = ((x - offset.float()) / safe).round().clamp(0, (1 << bits) - 1).nan_to_num(0.0)
    codes = reference.pack(q.flatten(-2).to(torch.uint8), bits)
    return QuantizedMatrix(codes, scale.squeeze(-1), offset.squeeze(-1), bits, group_size, w_ENK.shape[-1])
