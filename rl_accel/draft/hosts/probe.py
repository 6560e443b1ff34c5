"""Drafting for the doctor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rl_accel.feature import Check, Probe


class DraftProbe(Probe):
    """Asks whether speculation passed its self-test, and whether anything was drafted."""

    def engine_checks(self, found: Mapping[str, Any]) -> list[Check]:
        drafted = (found["spec_counts"] or {}).get("num_draft_tokens", 0)
        return [
            Check("speculation self-test", found["live"].get("self_test") == "passed"),
            Check(f"drafting by {self.settings.method}", drafted > 0, f"{drafted} tokens drafted"),
        ]
