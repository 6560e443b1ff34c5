"""Lookahead for the doctor."""

from __future__ import annotations

from rl_accel.feature import Check, Probe
from rl_accel.lookahead.hosts.reach import missing


class LookaheadProbe(Probe):
    """Asks a draft server that is there already for a token; the run itself starts any other."""

    def checks(self) -> list[Check]:
        draft = self.settings.draft
        if "://" not in draft:
            return []
        reason = missing(draft)
        return [Check(f"draft server {draft}", not reason, reason or "writes tokens")]
