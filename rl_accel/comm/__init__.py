"""SDP4Bit: 4-bit communication of sharded data parallelism.

The path: `attach` -> a host's glue (`hosts/deepspeed`, `hosts/fsdp2.py`) -> `CommHandle` -> `QuantizedCollectives` ->
`wire.Format` -> `kernels/codec`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl_accel.comm.config import SDP4BitConfig
    from rl_accel.comm.entry import attach, initialize
    from rl_accel.comm.handle import CommHandle
    from rl_accel.kernels.codec.api import dequantize, dequantize_add, quantize, requantize

_CODEC = "rl_accel.kernels.codec.api"
_WHERE = {
    "CommHandle": "rl_accel.comm.handle",
    "SDP4BitConfig": "rl_accel.comm.config",
    "attach": "rl_accel.comm.entry",
    "dequantize": _CODEC,
    "dequantize_add": _CODEC,
    "initialize": "rl_accel.comm.entry",
    "quantize": _CODEC,
    "requantize": _CODEC,
}
__all__ = [
    "CommHandle",
    "SDP4BitConfig",
    "attach",
    "dequantize",
    "dequantize_add",
    "initialize",
    "quantize",
    "requantize",
]


def __getattr__(name: str) -> Any:
    """Import on first use: the settings are read in processes that have no need of torch."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
