"""Counts of what the collectives of one rank sent."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Traffic:
    """Bytes that this rank sent to others, and what for."""

    gradient_intra: int = 0
    gradient_inter: int = 0
    weight_intra: int = 0
    weight_inter: int = 0
    gradient_values: int = 0
    """Gradient values that went through the reduction."""
    weight_values: int = 0
    """Weights that `gather_difference` renewed."""
