"""Settings of low-bit experts, `rl_accel.moe.*`."""

from __future__ import annotations

from dataclasses import dataclass

from rl_accel.errors import ConfigError
from rl_accel.kernels.moe_int3.widths import BITS, GROUP_SIZES

QUANTIZATION = "milo"
"""vLLM's name of the method."""
POLICIES = ("uniform", "kurtosis", "frequency", "budget")
MODES = ("auto", "materialized", "packed")
REFRESHES = ("cold", "warm")


@dataclass(frozen=True)
class MoEConfig:
    """Experts of the rollout copy in few bits, with low-rank compensators."""

    enable: bool = False
    """Quantize the experts of the rollout engines at every weight sync."""
    bits: int = 3
    """Of a code: 2, 3 or 4. `ranks=budget` chooses among them."""
    group_size: int = 64
    """Weights along a row that share scale and offset: 32 or 64."""
    rank: int = 16
    """Of the compensator of an expert's matrix; the mean where `ranks` shares it out; 0: none."""
    ranks: str = "uniform"
    """Who gets how much: uniform, kurtosis, frequency (of routing), or budget (bits and ranks by error per byte)."""
    budget_bits: float = 0.0
    """Of a weight with everything that belongs to it, for `ranks=budget`."""
    frequencies: str = ""
    """JSON of routing counts per expert, for `ranks=frequency`; in `ranks=budget` they weigh errors."""
    base: str = "ls"
    """Of the codes: ls (least squares), hqq or rtn."""
    linears: bool = False
    """Quantize attention, shared experts and dense layers, too."""
    rank_linears: int = -1
    """Of their compensators, which every token uses; -1: as `rank`."""
    mode: str = "auto"
    """materialized: quantized values in the policy's dtype through vLLM's own kernel; packed: packed bytes through
    ours; auto: materialized on a CPU, packed on a GPU."""
    refresh: str = "cold"
    """cold: a function of the weights alone; warm: begins at the last compensators, faster, depends on the history."""
    alternations: int = 4
    """Of codes and compensator at a cold refresh, at most; a warm one takes one."""
    max_refresh_share: float = 0.1
    """Of a step; a refresh that takes more loses alternations."""
    plan: str = ""
    """File of bits and ranks per tensor (`python -m rl_accel.moe.plan`); made where it is not given."""

    def __post_init__(self) -> None:
        choices = {
            "bits": BITS,
            "group_size": GROUP_SIZES,
            "ranks": POLICIES,
            "base": ("ls", "hqq", "rtn"),
            "mode": MODES,
            "refresh": REFRESHES,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"rl_accel.moe.{name} must be one of {', '.join(map(str, known))}; got {getattr(self, name)}"
                )
        if self.rank < 0 or self.rank_linears < -1:
            raise ConfigError(f"rl_accel.moe.rank must not be negative; got {self.rank}, {self.rank_linears}")
        if self.alternations < 1:
            raise ConfigError(f"rl_accel.moe.alternations must be at least 1; got {self.alternations}")
        if not 0 < self.max_refresh_share <= 1:
            raise ConfigError(f"rl_accel.moe.max_refresh_share must be in (0, 1]; got {self.max_refresh_share}")
        if (self.ranks == "budget") != (self.budget_bits > 0):
            raise ConfigError("rl_accel.moe.ranks=budget and rl_accel.moe.budget_bits (such as 3.7) go together")
        if self.ranks == "frequency" and not self.frequencies:
            raise ConfigError("rl_accel.moe.ranks=frequency needs rl_accel.moe.frequencies, a file of routing counts")

    @property
    def enabled(self) -> bool:
        return self.enable

    @property
    def rank_of_linears(self) -> int:
        return self.rank if self.rank_linears < 0 else self.rank_linears

    @property
    def needs_weights(self) -> bool:
        """Whether bits and ranks depend on the policy's weights."""
        return self.ranks in ("kurtosis", "budget")
