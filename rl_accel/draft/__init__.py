"""Drafting from rollout history with length-aware budgets (DAS)."""

from rl_accel.config import DraftConfig
from rl_accel.draft.drafter import SuffixDrafter

__all__ = ["DraftConfig", "SuffixDrafter"]
