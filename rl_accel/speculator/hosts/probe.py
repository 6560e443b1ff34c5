"""The speculator for the doctor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rl_accel.feature import Check, Probe


class SpeculatorProbe(Probe):
    """Asks the engine whether the head is there."""

    def engine_checks(self, found: Mapping[str, Any]) -> list[Check]:
        live = found["live"].get("features", {}).get("speculator")
        return [Check("draft head", bool(live), str(live or "not there"))]
