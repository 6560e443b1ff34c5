"""Settings of 4-bit communication, the same for `attach`, a ds_config block and `rl_accel.comm.*`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from rl_accel.errors import ConfigError
from rl_accel.kernels.codec.layout import MAX_GROUP, MIN_GROUP

BYPASSES = ("auto", "never")
BACKENDS = ("auto", "torch", "cpp", "triton")
ROUNDINGS = ("nearest", "stochastic")


@dataclass(frozen=True)
class SDP4BitConfig:
    """Quantized weights and gradients of sharded data parallelism (SDP4Bit §3; differs: gradients rounded to nearest,
    smaller groups of weights). Widths of 16 send bfloat16."""

    weights: bool = True
    """Send what the optimizer step changed in the weights instead of the weights."""
    weight_bits: int = 4
    """4, 8 or 16."""
    weight_group_size: int = 128
    """Values per scale. The paper's 2,048 saves 0.23 bits a weight and lets one large weight set the scale of many."""
    weight_difference: bool = True
    """False quantizes the weights themselves: a control that trains worse (paper table 3), nothing to use."""
    overlap_weights: bool = False
    """Let weights arrive while the next forward pass runs; each layer waits for its own (DeepSpeed ZeRO 1 and 2). Who
    reads parameters outside a forward pass, a state dict or the optimizer calls `handle.wait()` before."""
    sharded_weights: bool | None = None
    """Where no rank holds all weights (FSDP2, ZeRO 3): keep on every rank what the ranks at its place of all nodes own,
    so that differences can be sent to it and gathers stay inside the node. It takes P/L weights a rank, 2 bytes each in
    bfloat16. None: where a node has several ranks; with one rank a node it is a whole replica."""
    gradients: bool = True
    """Two-level reduce-scatter of gradients."""
    intra_bits: int = 8
    """Between the ranks of a node: 4, 8 or 16."""
    inter_bits: int = 4
    """Between nodes: 4, 8 or 16."""
    gradient_group_size: int = 128
    """Values per scale on both hops."""
    hadamard: bool = True
    """Rotate every 32 gradient values, which takes outliers out."""
    gradient_rounding: str = "nearest"
    """`nearest` or the paper's `stochastic`, which adds noise and takes longer. Weight differences are always rounded
    to nearest: their error is fed back."""
    max_buffer_mib: int = 512
    """Memory for what is on the way at one time, of gradients and of weights, in MiB."""
    local_size: int | None = None
    """Ranks per node. None: as the launcher or the host names say."""
    start_step: int = 0
    """Optimizer steps in full precision before quantization starts."""
    bypass: str = "auto"
    """`auto`: measure both ways while training and use DeepSpeed's own where the link is too fast to gain; `never`."""
    check_every: int = 0
    """Compare the weights of all ranks, by fingerprint, every so many steps; 0: never. A difference stops the run."""
    seed: int = 0
    """Seed of stochastic rounding."""
    backend: str = "auto"
    """`auto`, `torch`, `cpp` or `triton`; the same on all ranks."""

    def __post_init__(self) -> None:
        for name in ("weight_bits", "intra_bits", "inter_bits"):
            if getattr(self, name) not in (4, 8, 16):
                raise ConfigError(f"comm.{name} must be 4, 8 or 16; got {getattr(self, name)}")
        for name in ("weight_group_size", "gradient_group_size"):
            size = getattr(self, name)
            if not MIN_GROUP <= size <= MAX_GROUP or size & (size - 1):
                raise ConfigError(f"comm.{name} must be a power of two from {MIN_GROUP} to {MAX_GROUP}; got {size}")
        for name, known in (("gradient_rounding", ROUNDINGS), ("bypass", BYPASSES), ("backend", BACKENDS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"comm.{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        if self.local_size is not None and self.local_size < 1:
            raise ConfigError(f"comm.local_size must be at least 1; got {self.local_size}")
        if self.max_buffer_mib < 1:
            raise ConfigError(f"comm.max_buffer_mib must be at least 1; got {self.max_buffer_mib}")
        for name in ("start_step", "check_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"comm.{name} must not be negative; got {getattr(self, name)}")
        if not (self.weights or self.gradients):
            raise ConfigError("comm.weights and comm.gradients are both off; nothing is left to do")

    @classmethod
    def paper(cls) -> SDP4BitConfig:
        """As published: groups of 2,048 for weights, stochastic rounding of gradients."""
        return replace(cls(), weight_group_size=2048, gradient_rounding="stochastic")

    @classmethod
    def zeropp(cls) -> SDP4BitConfig:
        """Bit widths of ZeRO++ (int8 weights, int4 gradients on both hops, no rotation), to compare with."""
        return cls(
            weight_bits=8,
            weight_difference=False,
            weight_group_size=2048,
            intra_bits=4,
            gradient_group_size=2048,
            hadamard=False,
        )


@dataclass(frozen=True)
class CommConfig(SDP4BitConfig):
    """4-bit communication of the training engine (`rl_accel.comm.*`): `SDP4BitConfig` and a switch."""

    enable: bool = False
    """Needs strategy=fsdp2 or deepspeed. Lossy: see docs/communication.md for what it does to the loss."""

    @property
    def enabled(self) -> bool:
        return self.enable

    def settings(self) -> dict[str, Any]:
        """The fields of `SDP4BitConfig` as plain values; empty where it is off."""
        return {name: value for name, value in asdict(self).items() if name != "enable"} if self.enable else {}
