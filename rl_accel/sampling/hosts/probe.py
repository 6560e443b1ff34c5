"""Exact sampling for the doctor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rl_accel.feature import Check, Probe


class SamplingProbe(Probe):
    """Asks whether a request gets the same tokens alone and in a full batch."""

    def engine_checks(self, found: Mapping[str, Any]) -> list[Check]:
        return [Check("same tokens alone and in a batch", found["batch_invariant"])]
