"""MiLo: a matrix as low-bit codes plus a low-rank compensator, W ~ dequantize(codes) + U V.

In turn: quantize what the compensator leaves, W - U V, then take the best rank-r approximation of what the codes
leave. U and V are quantized to 4 bits inside the loop, V first and U refitted to the V that is stored, so the codes
see the compensator as it will be used. The best state seen is returned. A matrix drops out of the loop when the mean of
its last three errors has gained less than `tolerance`.

With `unbiased`, codes of each row are scaled so that <W^, W> = <W, W>: least squares shrinks, and a row that is too
short costs more likelihood than one that is a little noisier. It takes no bytes, as scales carry it.

Left out: calibration data. Cost: per alternation one pass of the base quantizer, products of N K r and, the first time,
min(N, K)^3 per matrix up to 512 wide.

Source: MiLo §3 (alternation, stop rule with a window of three); differs: a base by least squares, factors quantized in
the loop at 4 bits with refit, a stop rule that is applied, per matrix; unbiased rows.

Shape suffixes: E matrices, N rows, K columns, R rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from rl_accel.errors import MoEError
from rl_accel.kernels.moe_int3 import api
from rl_accel.kernels.moe_int3.layout import Factors, QuantizedMatrix, check_width
from rl_accel.moe.bases import BASES
from rl_accel.moe.low_rank import METHODS, each, low_rank

WINDOW = 3
FACTOR_ITERATIONS = 3
MAX_GAIN = 2.0


@dataclass(frozen=True)
class Method:
    """How matrices are compressed; says nothing about how many bytes they may take."""

    base: str = "ls"
    alternations: int = 20
    """At most."""
    tolerance: float = 1e-4
    """Relative gain of the mean error over a window of three below which a matrix is done."""
    svd: str = "auto"
    unbiased: bool = True

    def __post_init__(self) -> None:
        if self.base not in BASES:
            raise MoEError(f"base quantizer {self.base!r} is unknown; known: {', '.join(BASES)}")
        if self.svd not in METHODS:
            raise MoEError(f"svd {self.svd!r} is unknown; known: {', '.join(METHODS)}")
        if self.alternations < 1:
            raise MoEError(f"at least one alternation is needed; got {self.alternations}")


@dataclass(frozen=True)
class Compressed:
    """A batch of matrices after `compress`."""

    matrix: QuantizedMatrix
    factors: Factors | None
    errors_E: torch.Tensor = field(repr=False)
    """Relative Frobenius error of each, float32."""
    alternations_E: torch.Tensor = field(repr=False)
    """That each took, int64."""

    def weight(self) -> torch.Tensor:
        """Return what the matrices stand for, float32 [E, N, K]."""
        found = api.dequantize(self.matrix)
        if self.factors is not None:
            starts = self.factors.starts.tolist()
            u_RN, v_RK = unpack_factors(self.factors, self.matrix)
            for matrix, (start, end) in enumerate(itertools.pairwise(starts)):
                if end > start:
                    found[matrix] += u_RN[start:end].T @ v_RK[start:end]
        return found

    def memory_bytes(self) -> int:
        return self.matrix.memory_bytes() + (self.factors.memory_bytes() if self.factors is not None else 0)

    def bits_per_weight(self) -> float:
        matrix = self.matrix
        return 8 * self.memory_bytes() / (matrix.num_matrices * matrix.out_features * matrix.in_features)


def unpack_factors(factors: Factors, matrix: QuantizedMatrix) -> tuple[torch.Tensor, torch.Tensor]:
    """Return U transposed, float32 [sum of ranks, N], and V, float32 [sum of ranks, K]."""
    return (
        api.dequantize_factor(factors.u_codes, factors.u_scales, matrix.out_features),
        api.dequantize_factor(factors.v_codes, factors.v_scales, matrix.in_features),
    )


@torch.no_grad()
def compress(
    w_ENK: torch.Tensor, bits: int, group_size: int, ranks: Sequence[int], method: Method | None = None,
    start: Compressed | None = None,
) -> Compressed:  # fmt: skip
    """Compress a batch of matrices.

    Args:
        w_ENK: float32, of any device; contiguous.
        bits: of codes: 2, 3 or 4.
        group_size: 32 or 64 weights along K.
        ranks: of the compensator of each matrix; 0 for none.
        start: of weights that were near, with these ranks: its compensators are where the loop begins.

    Raises:
        MoEError: for a width that does not fit, or ranks that do not.
    """
    method = method or Method()
    check_width(bits, group_size, w_ENK.shape[-1])
    if len(ranks) != len(w_ENK) or any(not 0 <= rank <= min(w_ENK.shape[1:]) for rank in ranks):
        raise MoEError(f"each of {len(w_ENK)} matrices needs a rank of 0 to {min(w_ENK.shape[1:])}; got {list(ranks)}")
    return _Loop(w_ENK, bits, group_size, list(ranks), method, start).run()


class _Loop:
    """State of the alternation: the best of every matrix so far, and the current compensators."""

    def __init__(self, w_ENK, bits: int, group_size: int, ranks: list[int], method: Method, start: Compressed | None):
        self.w, self.bits, self.group_size, self.ranks, self.method = w_ENK, bits, group_size, ranks, method
        count, device = len(w_ENK), w_ENK.device
        self.rank = max(ranks)
        self.kept_ER = torch.arange(self.rank, device=device) < torch.tensor(ranks, device=device)[:, None]
        self.norms = each(_norm, w_ENK).clamp(min=1e-30)
        self.best: dict[str, torch.Tensor] = {}
        self.errors = torch.full((count,), torch.inf, dtype=torch.float32, device=device)
        self.alternations = torch.zeros(count, dtype=torch.int64, device=device)
        self.u, self.v = self._first_factors(start)

    def _first_factors(self, start: Compressed | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if start is None or start.factors is None:
            return None, None
        if (start.factors.starts.diff().tolist(), start.matrix.num_matrices) != (self.ranks, len(self.w)):
            raise MoEError("the compensators to start from have other ranks")
        u_RN, v_RK = unpack_factors(start.factors, start.matrix)
        shape = (len(self.w), self.rank)
        u, v = u_RN.new_zeros(*shape, u_RN.shape[1]), v_RK.new_zeros(*shape, v_RK.shape[1])
        u[self.kept_ER], v[self.kept_ER] = u_RN, v_RK
        return u.mT, v

    def run(self) -> Compressed:
        active = torch.arange(len(self.w), device=self.w.device)
        history: list[torch.Tensor] = []
        while len(active) and len(history) < self.method.alternations:
            errors = self._alternate(active)
            history.append(torch.full_like(self.errors, torch.nan).index_copy(0, active, errors))
            self.alternations[active] += 1
            active = active[self._goes_on(active, history)]
        if self.method.unbiased:
            self._scale_rows()
        return self._result()

    def _goes_on(self, active: torch.Tensor, history: list[torch.Tensor]) -> torch.Tensor:
        goes_on = self.kept_ER[active].any(-1)  # without a compensator the second turn is the first
        if len(history) > WINDOW:
            before, now = (torch.stack(part).mean(0)[active] for part in (history[-WINDOW - 1 : -1], history[-WINDOW:]))
            goes_on &= before - now >= self.method.tolerance * before
        return goes_on

    def _alternate(self, active: torch.Tensor) -> torch.Tensor:
        """Do one turn for the matrices `active`; return their relative errors."""
        w = self.w if len(active) == len(self.w) else self.w[active]
        near = None
        if self.u is None or self.v is None:
            target = w
        else:
            near = self.v[active]
            target = each(_less, w, self.u[active], near)
        matrix = BASES[self.method.base](target.contiguous(), self.bits, self.group_size)
        residual = w - api.dequantize(matrix)
        parts = {"codes": matrix.codes, "scales": matrix.scales, "offsets": matrix.offsets}
        if self.rank:
            u, v, factors = self._factors(residual, near, self.kept_ER[active])
            parts.update(factors)
            residual = each(_less, residual, u, v)
            if self.u is None or self.v is None:
                self.u, self.v = w.new_zeros(len(self.w), *u.shape[1:]), w.new_zeros(len(self.w), *v.shape[1:])
            self.u[active], self.v[active] = u, v
        errors = each(_norm, residual) / self.norms[active]
        self._keep_best(active, errors, parts)
        return errors

    def _factors(self, residual: torch.Tensor, near: torch.Tensor | None, kept_ER: torch.Tensor) -> tuple:
        """Return U [E, N, R] and V [E, R, K] as they will be stored, and what is stored."""
        v = low_rank(residual, self.rank, self.method.svd, near)[1] * kept_ER[..., None]
        v, v_codes, v_scales = _quantized(v)
        u = each(_fitted, v, residual, kept_ER)
        u, u_codes, u_scales = _quantized(u * kept_ER[..., None])
        stored = {"u_codes": u_codes, "u_scales": u_scales, "v_codes": v_codes, "v_scales": v_scales}
        return u.mT, v, stored

    def _keep_best(self, active: torch.Tensor, errors: torch.Tensor, parts: dict[str, torch.Tensor]) -> None:
        better = (errors < self.errors[active]) | ~torch.isfinite(errors)
        if not self.best:
            self.best, better = {name: part.clone() for name, part in parts.items()}, torch.ones_like(better)
        else:
            for name, part in parts.items():
                self.best[name][active[better]] = part[better]
        self.errors[active[better]] = errors[better]

    def _scale_rows(self) -> None:
        codes_part = api.dequantize(self._matrix())
        rest = self.w
        if self.rank:
            u, v = (_values(self.best[f"{x}_codes"], self.best[f"{x}_scales"]) for x in ("u", "v"))
            rest = each(_less, self.w, u[..., : self.w.shape[1]].mT, v[..., : self.w.shape[2]])
        wanted, found = (self.w * rest).sum(-1, keepdim=True), (self.w * codes_part).sum(-1, keepdim=True)
        gain = torch.where(found > 0, wanted / found.clamp(min=1e-30), 1.0).clamp(1.0 / MAX_GAIN, MAX_GAIN)
        for name in ("scales", "offsets"):
            self.best[name] = (self.best[name].float() * gain).half()
        residual = rest - api.dequantize(self._matrix())
        self.errors = each(_norm, residual) / self.norms

    def _matrix(self) -> QuantizedMatrix:
        parts = (self.best[name] for name in ("codes", "scales", "offsets"))
        return QuantizedMatrix(*parts, self.bits, self.group_size, self.w.shape[-1])

    def _result(self) -> Compressed:
        factors = None
        if self.rank:
            starts = torch.tensor([0, *self.ranks], device=self.w.device).cumsum(0).int()
            rows = {
                name: self.best[name][self.kept_ER] for name in ("v_codes", "v_scales", "u_codes", "u_scales")
            }  # experts follow each other
            factors = Factors(**rows, starts=starts)
        return Compressed(self._matrix(), factors, self.errors, self.alternations)


def _norm(x_ENK: torch.Tensor) -> torch.Tensor:
    return x_ENK.flatten(1).norm(dim=1)


def _less(x_ENK: torch.Tensor, u_ENR: torch.Tensor, v_ERK: torch.Tensor) -> torch.Tensor:
    return torch.baddbmm(x_ENK, u_ENR, v_ERK, alpha=-1.0)


def _fitted(v_ERK: torch.Tensor, residual_ENK: torch.Tensor, kept_ER: torch.Tensor) -> torch.Tensor:
    """Return the U, transposed, that fits the residual best with this V; rows beyond a rank carry nothing."""
    gram = v_ERK @ v_ERK.mT
    ridge = 1e-6 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None].clamp(min=1e-30) + (~kept_ER).float()
    return torch.linalg.solve(gram + torch.diag_embed(ridge), v_ERK @ residual_ENK.mT)


def _quantized(x_ERL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return values as stored [E, R, L], codes and scales."""
    codes, scales = api.quantize_factor(x_ERL.flatten(0, 1).contiguous(), FACTOR_ITERATIONS)
    values = api.dequantize_factor(codes, scales, x_ERL.shape[-1])
    shape = x_ERL.shape[:2]
    return values.unflatten(0, shape), codes.unflatten(0, shape), scales.unflatten(0, shape)


def _values(codes_ERB: torch.Tensor, scales_ERB: torch.Tensor) -> torch.Tensor:
    """Return values of all blocks, padding included."""
    length = scales_ERB.shape[-1] * 64
    flat = api.dequantize_factor(codes_ERB.flatten(0, 1), scales_ERB.flatten(0, 1), length)
    return flat.unflatten(0, codes_ERB.shape[:2])
