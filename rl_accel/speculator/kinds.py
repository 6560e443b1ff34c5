"""The kinds of draft models, by the setting `rl_accel.speculator.head`; nothing else in the trainer knows several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rl_accel.speculator import eagle, head, served
from rl_accel.speculator.flat import FlatHead, FlatShape


@dataclass(frozen=True)
class Kind:
    """One kind."""

    name: str
    shape: type[FlatShape]
    head: type[FlatHead]
    first_weights: Callable[[Any, int, torch.Tensor | None], torch.Tensor]
    """(shape, seed, the policy's embeddings or None) -> float32 [num_weights]."""
    num_folded: Callable[[Any], int]
    """Numbers that a swap hands to the engine."""
    fold: Callable[[Any, torch.Tensor], torch.Tensor]
    """(shape, float32 [num_weights]) -> what a swap hands to the engine, float32 [num_folded]."""


KINDS = {
    kind.name: kind
    for kind in (
        Kind("recurrent", head.HeadShape, head.DraftHead, head.first_weights, served.num_folded, served.fold),
        Kind(
            "eagle3",
            eagle.EagleShape,
            eagle.EagleHead,
            eagle.first_weights,
            lambda shape: shape.num_weights,
            lambda shape, flat: flat,
        ),
    )
}


def kind_of(shape: FlatShape) -> Kind:
    """Return the kind that a shape belongs to."""
    return next(kind for kind in KINDS.values() if type(shape) is kind.shape)


def new_head(shape: FlatShape) -> FlatHead:
    """Return a head of zeros."""
    return kind_of(shape).head(shape)


def shape_values(shape: FlatShape) -> dict[str, Any]:
    """Return a shape as plain values for files and other processes; `shape_of` reads them."""
    return {"kind": kind_of(shape).name, **vars(shape)}


def shape_of(values: Mapping[str, Any]) -> FlatShape:
    """Return the shape of `shape_values`; without a kind, as older files are, a recurrent head's.

    Raises:
        ValueError: for a kind that is not known.
        TypeError: for other fields than that kind has.
    """
    fields = dict(values)
    name = fields.pop("kind", "recurrent")
    if name not in KINDS:
        raise ValueError(f"a head of the kind {name!r}; known are {', '.join(KINDS)}")
    return KINDS[name].shape(**fields)
