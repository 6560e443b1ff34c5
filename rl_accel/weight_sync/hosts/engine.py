"""What an engine knows of its last weight sync, and the proof that its kernels use the weights.

The read-back needs buckets as they arrive, which the CPU's receive path gives (`hosts/verl/worker_extension.py`).
"""

from __future__ import annotations

from typing import Any

from rl_accel.errors import WeightSyncError
from rl_accel.feature import Engine
from rl_accel.weight_sync.readback import SentSample, readback_error

READBACK_TOLERANCE = 1e-5
"""Largest difference in float32 between a weight as sent and as used by the CPU kernels."""


class SyncEngine(Engine):
    """Keeps a sample of what is sent and compares it with what the kernels multiply with."""

    def __init__(self, settings: Any, vllm_config: Any):
        super().__init__(settings, vllm_config)
        self._sent: SentSample | None = None
        self._bytes = 0
        self._last: dict[str, float] = {}

    def on_bucket(self, weights: list[tuple[str, Any]]) -> None:
        if self._sent is None and self._wants_readback():
            self._sent = SentSample()
        self._bytes += sum(tensor.nbytes for _, tensor in weights)
        if self._sent is not None:
            self._sent.add(weights)

    def on_weights(self, runner: Any, seconds: float) -> None:
        """
        Raises:
            WeightSyncError: if a kernel uses another weight than was sent.
        """
        sent, self._sent = self._sent, None
        self._last["seconds"] = seconds  # the read-back error of an earlier sync stays visible
        if self._bytes:
            self._last["bytes"], self._bytes = float(self._bytes), 0
        if sent is None:
            return
        error, name = readback_error(runner.model, sent, [role.expected_weight for role in runner.rl_accel.values()])
        self._last["readback_max_abs_err"] = error
        if not error <= READBACK_TOLERANCE:
            raise WeightSyncError(
                f"weight {name} as the engine's kernel uses it differs by {error:.3g} from what was sent"
            )

    def last_sync(self) -> dict[str, float]:
        """Return the metrics of the last sync."""
        return dict(self._last)

    def _wants_readback(self) -> bool:
        when = self.settings.readback
        return when == "every" or (when == "first" and "readback_max_abs_err" not in self._last)
