"""4-bit communication for the doctor."""

from __future__ import annotations

from rl_accel.feature import Check, Probe
from rl_accel.probing import run_probe


class CommProbe(Probe):
    """Looks for its host symbols in the installed DeepSpeed, and compares backends of the codec."""

    def checks(self) -> list[Check]:
        live, error = run_probe("rl_accel.comm.hosts.probe_process")
        if live is None:
            return [Check("DeepSpeed and codec", False, error)]
        return [Check(name, ok) for name, ok in live.items()]
