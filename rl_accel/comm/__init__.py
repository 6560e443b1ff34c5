"""SDP4Bit: 4-bit communication of sharded data parallelism.

The path: `attach` -> a host's glue (`hosts/deepspeed`, `hosts/fsdp2.py`) -> `Handle` -> `QuantisedCollectives` ->
`wire.Format` -> `codec` -> a backend (`kernels/codec`).
"""

from rl_accel.comm.attach import attach, initialize
from rl_accel.comm.codec import dequantize, dequantize_add, quantize, requantize
from rl_accel.comm.config import SDP4BitConfig
from rl_accel.comm.handle import Handle

__all__ = ["Handle", "SDP4BitConfig", "attach", "dequantize", "dequantize_add", "initialize", "quantize", "requantize"]
