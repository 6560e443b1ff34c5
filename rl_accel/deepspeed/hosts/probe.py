"""The DeepSpeed engine for the doctor."""

from __future__ import annotations

from rl_accel.errors import VersionError
from rl_accel.feature import Check, Probe
from rl_accel.hosts import versions


class DeepSpeedProbe(Probe):
    def checks(self) -> list[Check]:
        try:
            versions.check_deepspeed()
        except VersionError as error:
            return [Check("DeepSpeed's version", False, str(error))]
        return [Check("DeepSpeed's version", True, str(versions.installed("deepspeed")))]
