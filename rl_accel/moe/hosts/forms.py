"""The tensors that a layer of packed experts holds, and what kernels are given of them.

On a CPU they are the canonical layout (`kernels/moe_int3/layout.py`), on a GPU the planes that the Triton kernels read,
arranged once when weights arrive. Both have a fixed list of names, some of which a matrix may lack, and four integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rl_accel.kernels.moe_int3.layout import Factors, QuantizedMatrix
from rl_accel.moe.compress import Compressed

Parts = Sequence[torch.Tensor | None]


class CanonicalForm:
    """Codes, scales, offsets and factors as they are compressed."""

    name = "canonical"
    matrix_names = ("codes", "scales", "offsets")
    factor_names = ("v_codes", "v_scales", "u_codes", "u_scales", "starts")
    names = (*matrix_names, *factor_names)

    @classmethod
    def tensors(cls, found: Compressed) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Return tensors by name, and bits, group size, input features and 0."""
        matrix, factors = found.matrix, found.factors
        parts = {name: getattr(matrix, name) for name in cls.matrix_names}
        if factors is not None:
            parts |= {name: getattr(factors, name) for name in cls.factor_names}
        return parts, [matrix.bits, matrix.group_size, matrix.in_features, 0]

    @classmethod
    def arguments(cls, parts: Parts, widths: Sequence[int]) -> tuple[Any, Any]:
        """Return matrix and compensators for `api.experts`."""
        matrix, factors = parts[: len(cls.matrix_names)], parts[len(cls.matrix_names) :]
        return (
            QuantizedMatrix(*matrix, *widths[:3]),  # type: ignore[arg-type]
            Factors(*factors) if factors[0] is not None else None,  # type: ignore[arg-type]
        )


class PlaneForm:
    """What `triton_planes.to_planes` makes of them."""

    name = "planes"
    matrix_names = ("low", "high", "affine")
    factor_names = ("v", "v_scales", "u", "u_scales", "starts")
    names = (*matrix_names, *factor_names)

    @classmethod
    def tensors(cls, found: Compressed) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Return tensors by name, and bits, group size, input features and the largest rank."""
        from rl_accel.kernels.moe_int3.triton_planes import to_planes

        planes = to_planes(found.matrix, found.factors)
        parts = {name: getattr(planes, name) for name in cls.matrix_names}
        if planes.factors is not None:
            parts |= {name: getattr(planes.factors, name) for name in cls.factor_names}
        max_rank = planes.factors.max_rank if planes.factors is not None else 0
        present = {name: part for name, part in parts.items() if part is not None}
        return present, [planes.bits, planes.group_size, planes.in_features, max_rank]

    @classmethod
    def arguments(cls, parts: Parts, widths: Sequence[int]) -> tuple[Any, Any]:
        """Return one matrix that has its compensators, and None."""
        from rl_accel.kernels.moe_int3.triton_planes import PlaneFactors, PlaneMatrix

        bits, group_size, in_features, max_rank = widths
        matrix, factors = parts[: len(cls.matrix_names)], parts[len(cls.matrix_names) :]
        held = PlaneFactors(*factors, max_rank) if factors[0] is not None else None  # type: ignore[arg-type]
        return PlaneMatrix(*matrix, bits, group_size, in_features, held), None  # type: ignore[arg-type]


FORMS: dict[str, Any] = {form.name: form for form in (CanonicalForm, PlaneForm)}
