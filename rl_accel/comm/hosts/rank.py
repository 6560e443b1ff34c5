"""4-bit communication on a training rank of verl.

Rollout engines get the weights that training computes with: at ZeRO 1 and 2 the replicas, which the module
holds; on FSDP2 and at ZeRO 3 the secondary shards, where the parameters hold the optimizer's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rl_accel.comm import CommHandle, SDP4BitConfig, attach
from rl_accel.config import build
from rl_accel.feature import Rank

_COUNTED = (
    "gradient_intra_bytes",
    "gradient_inter_bytes",
    "weight_intra_bytes",
    "weight_inter_bytes",
    "gradients_s",
    "weights_s",
    "weight_resyncs",
)


class CommRank(Rank):
    """Holds the handle of one engine."""

    def __init__(self, settings: Mapping[str, Any]):
        super().__init__(settings)
        self.handle: CommHandle | None = None
        self._before: dict[str, Any] = {}

    def attach(self, engine: Any, optimizer: Any) -> None:
        self.handle = attach(engine, build(SDP4BitConfig, self.settings, "rl_accel.comm"), optimizer)

    def held_weights(self) -> Iterator[tuple[str, Any]] | None:
        assert self.handle is not None
        return self.handle.whole_weights()

    def begin_update(self) -> None:
        assert self.handle is not None
        self._before = self._before or self.handle.stats()

    def metrics(self) -> dict[str, float]:
        """Count from one update to the next: on FSDP2 the last step's weights are sent after it, when somebody gathers
        them."""
        assert self.handle is not None
        before, after = self._before, self.handle.stats()
        self._before = after
        found = {name: after[name] - before[name] for name in _COUNTED}
        found["num_nodes"] = after["num_nodes"]
        return found | {f"{what}_quantized": before[f"{what}_quantized"] for what in ("gradients", "weights")}

    def state_dict(self) -> dict[str, Any]:
        assert self.handle is not None
        return self.handle.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert self.handle is not None
        self.handle.load_state_dict(state)
