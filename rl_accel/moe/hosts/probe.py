"""Low-bit experts for the doctor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rl_accel import machine
from rl_accel.errors import RLAccelError
from rl_accel.feature import Check, Probe
from rl_accel.kernels.moe_int3 import api


class MoEProbe(Probe):
    """Asks whether kernels are built, and what the layers of an engine hold."""

    def checks(self) -> list[Check]:
        try:
            backend = api.load_backend("auto", "cuda" if machine.has_gpu() else "cpu")
        except RLAccelError as error:
            return [Check("kernels", False, str(error))]
        return [Check("kernels", True, backend.__name__.rpartition(".")[2])]

    def engine_checks(self, found: Mapping[str, Any]) -> list[Check]:
        live = found["live"]["features"].get("moe") or {}
        detail = f"{live.get('tensors')} tensors by bits, {live.get('bits_per_weight')} bits all in, {live.get('mode')}"
        return [Check("experts in few bits", bool(live.get("tensors")), detail)]
