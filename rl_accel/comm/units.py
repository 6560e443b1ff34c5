"""Which parts of a model need which weights when its forward pass reaches them.

A unit is an element of an outermost `ModuleList` or `Sequential`: a layer, as FSDP would wrap it. Its weights are
waited for when its forward begins. All other weights (embeddings, last norm, head) are waited for when the forward of
the root, or of any module outside the units, begins. A unit that a first forward pass does not enter by its own
`forward` counts as outside. Not covered: code that reads a unit's weights without calling the unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

OUTSIDE = 0
"""Number of what lies outside all units; units count from 1, in the order of the model."""


def units_of(module: nn.Module) -> list[nn.Module]:
    """Return the elements of the outermost containers, in order."""
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            found += child
        else:
            found += units_of(child)
    return found


class Units:
    """The units of a model and where their weights lie in flat tensors.

    Args:
        module: the root.
        flats: tensors that the weights are views of.
    """

    def __init__(self, module: nn.Module, flats: Sequence[torch.Tensor]):
        self.module = module
        self.units = units_of(module)
        self.entered: set[int] = set()
        """Units whose forward was called since `watch`."""
        owners: dict[int, int] = {}
        for number, unit in reversed([*enumerate(self.units, start=1)]):
            for parameter in unit.parameters():
                owners[id(parameter)] = number
        inside = {id(parameter) for unit in self.units for parameter in unit.parameters()}
        shared = {id(parameter) for parameter in _outside(module, self.units)} & inside
        self._ranges: list[list[tuple[int, int, int]]] = [[] for _ in flats]
        for parameter in module.parameters():
            number = OUTSIDE if id(parameter) in shared else owners.get(id(parameter), OUTSIDE)
            for flat, ranges in zip(flats, self._ranges, strict=True):
                first = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
                if parameter.numel() and 0 <= first < flat.numel() and parameter.dtype == flat.dtype:
                    ranges.append((first, first + parameter.numel(), number))

    def priority(self, flat: int, first: int, count: int) -> int:
        """What needs values [first, first + count) of a flat tensor first; more than all units if nothing does."""
        needed = [number for low, high, number in self._ranges[flat] if low < first + count and first < high]
        return min(needed, default=len(self.units) + 1)

    def needing(self, flat: int, first: int, count: int) -> set[int]:
        """All that needs values of this range."""
        return {number for low, high, number in self._ranges[flat] if low < first + count and first < high}

    def hook(self, entering: Callable[[int], None]) -> list[torch.utils.hooks.RemovableHandle]:
        """Call `entering` with the number of what is about to run."""
        handles = []
        for number, unit in enumerate(self.units, start=1):

            def enter(*_: object, number: int = number) -> None:
                self.entered.add(number)
                entering(number)

            handles.append(unit.register_forward_pre_hook(enter, prepend=True))
        inside = {id(part) for unit in self.units for part in unit.modules()}
        for part in self.module.modules():
            if id(part) not in inside:
                handles.append(part.register_forward_pre_hook(lambda *_: entering(OUTSIDE), prepend=True))
        return handles


def _outside(module: nn.Module, units: Sequence[nn.Module]) -> list[nn.Parameter]:
    inside = {id(part) for unit in units for part in unit.modules()}
    return [p for part in module.modules() if id(part) not in inside for p in part.parameters(recurse=False)]
