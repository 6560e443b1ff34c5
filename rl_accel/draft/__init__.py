"""Drafting from rollout history with length-aware budgets (DAS)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl_accel.draft.config import DraftConfig
    from rl_accel.draft.drafter import SuffixDrafter

_WHERE = {"DraftConfig": "config", "SuffixDrafter": "drafter"}
__all__ = ["DraftConfig", "SuffixDrafter"]


def __getattr__(name: str) -> Any:
    """Import on first use: the settings are read in processes that have no need of the index."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
