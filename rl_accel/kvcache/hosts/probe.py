"""The quantized KV cache for the doctor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rl_accel import machine
from rl_accel.errors import RLAccelError
from rl_accel.feature import Check, Probe
from rl_accel.kernels.kv_int4 import api


class KVCacheProbe(Probe):
    """Asks whether kernels are built, and what the layers of an engine hold."""

    def checks(self) -> list[Check]:
        kind = "cuda" if machine.has_gpu() else "cpu"
        try:
            backend = api.load_backend("auto", kind)
        except RLAccelError as error:
            return [Check("kernels", False, str(error))]
        detail = backend.instructions() if kind == "cpu" else "triton"
        return [Check("kernels", True, detail)]

    def engine_checks(self, found: Mapping[str, Any]) -> list[Check]:
        live = found["live"]["features"].get("kvcache") or {}
        detail = (
            f"{live.get('int4_layers')} layers of 4 bits, {live.get('int8_layers')} of 8, orders {live.get('orders')}"
        )
        return [
            Check("pages of 4 bits", bool(live.get("int4_layers")), detail),
            Check("a request alone gets the tokens that it gets in a batch", bool(found["batch_invariant"])),
        ]
