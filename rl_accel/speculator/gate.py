"""Which candidates may be served: finite ones that do at least as well as what is served, on rollouts neither saw."""

from __future__ import annotations

import torch

from rl_accel.speculator.flat import FlatHead
from rl_accel.speculator.kinds import new_head
from rl_accel.speculator.learner import expected_accept
from rl_accel.speculator.replay import Batch

TOLERANCE = 0.98
"""Share of the served head's expected acceptance that a candidate needs: estimates scatter by 1 to 2 %."""


class SwapGate:
    """Holds the weights that are served, and judges others."""

    def __init__(self, served: FlatHead, depth: int):
        self.served, self.depth = served, depth
        self._candidate = new_head(served.shape)
        self.candidate_accept = 0.0
        self.served_accept = 0.0
        """Accepted tokens a draft that each can expect, when last compared."""

    def admit(self, flat: torch.Tensor, held_out: Batch) -> str:
        """Return "" if the weights may be served, and take them as the served ones; else the reason.

        Args:
            flat: float32 [num_weights].
            held_out: a batch of requests that were not learned from.
        """
        if flat.shape != self.served.flat.shape:
            return f"{tuple(flat.shape)} weights; the head has {tuple(self.served.flat.shape)}"
        if not torch.isfinite(flat).all():
            return "not finite"
        with torch.no_grad():
            self._candidate.flat.copy_(flat)
        self.candidate_accept = expected_accept(self._candidate, held_out, self.depth)
        self.served_accept = expected_accept(self.served, held_out, self.depth)
        if not self.candidate_accept >= TOLERANCE * self.served_accept:
            return f"accepts {self.candidate_accept:.3f} tokens a draft, and the served one {self.served_accept:.3f}"
        self.serve(flat)
        return ""

    def serve(self, flat: torch.Tensor) -> None:
        """Note which weights are served."""
        with torch.no_grad():
            self.served.flat.copy_(flat)
