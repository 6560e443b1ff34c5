"""Settings of the online speculator, `rl_accel.speculator.*`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rl_accel.config import unknown
from rl_accel.errors import ConfigError

HEADS = ("recurrent", "eagle3")
MAX_DEPTH = 32


@dataclass(frozen=True)
class SpeculatorConfig:
    """A draft head that learns from rollouts while they run (`rl_accel.speculator.*`)."""

    enable: bool = False
    """Draft with the head; `rl_accel.draft.method` is `auto` then (history or head, whichever is worth more) unless it
    is set to `head`."""
    head: str = "recurrent"
    """`recurrent`: small, without attention, one of two sources of `auto`. `eagle3`: in EAGLE-3's form, drafted with by
    vLLM itself, with `rl_accel.draft.method=head`."""
    learn: bool = True
    """Train the head on what the engine generates. Off: it serves as it was restored."""
    width: int = 0
    """Width of the head. 0: that of the policy, at most 512."""
    draft_vocab: int = 0
    """`eagle3`: tokens that it can draft, the first ones of the vocabulary and those that end texts. 0: all."""
    history: int = 4
    """Tokens before the last one that the head sees, 0 to 8."""
    depth: int = 4
    """Draft tokens that training looks ahead."""
    learning_rate: float = 8e-3
    """Of AdamW, after 20 steps of warm-up."""
    batch_tokens: int = 256
    """Tokens that a training step learns from."""
    replay_tokens: int = 65536
    """Tokens of recent rollouts that are learned from; older ones are dropped."""
    max_policy_lag: int = 2
    """Weight syncs after which the traces of a policy are dropped."""
    rejected_weight: float = -1.0
    """Extra weight of the first rejected token of a served draft. -1: learned, 0 where it does not help."""
    publish_s: float = 2.0
    """Least seconds between two candidates for serving."""
    max_trace_share: float = 0.015
    """Largest share of the engine's time that leaving traces may take, above 0, at most 1; fewer steps leave them
    where it takes more."""
    trainer_tap: bool = False
    """Learn from the states of the trainer's pass of old log-probs, too, of rollouts that the engine left no traces of;
    with FSDP2 and DeepSpeed."""
    threads: int = 1
    """CPU threads of the trainer."""
    nice: int = 0
    """Its scheduling priority below the engine's, 0 to 19."""
    max_share: float = 1.0
    """Largest share of the time that it trains, 0 to 1; it trains less where that costs more than it brings."""
    advance_s: float = -1.0
    """Seconds by which learning may lengthen rollouts before it has to pay. -1: what a learned head would save in 4,000
    engine steps, nothing where learning costs more or a head would save little."""
    seed: int = 0
    """Of the head's first weights and of sampling from the traces."""
    state: str = ""
    """Folder in which a server keeps the head over restarts (`rl_accel.speculator.serve`). Empty: nowhere; under verl
    the checkpoint holds it."""

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise ConfigError(unknown("rl_accel.speculator.head", self.head, HEADS))
        ranges = {
            "width": (0, 8192), "draft_vocab": (0, 1 << 24), "history": (0, 8), "depth": (1, MAX_DEPTH),
            "batch_tokens": (64, 1 << 20), "replay_tokens": (4096, 1 << 24), "max_policy_lag": (0, 1 << 20),
            "threads": (1, 256), "nice": (0, 19),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"rl_accel.speculator.{name} must be {low} to {high}; got {getattr(self, name)}")
        if self.draft_vocab and self.head != "eagle3":
            raise ConfigError(
                f"rl_accel.speculator.draft_vocab={self.draft_vocab} is for rl_accel.speculator.head=eagle3; head is "
                f"{self.head}, which drafts all tokens"
            )
        for name in ("learning_rate", "publish_s"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"rl_accel.speculator.{name} must be positive and finite; got {value}")
        if not (self.rejected_weight == -1.0 or 0.0 <= self.rejected_weight <= 100.0):
            raise ConfigError(
                f"rl_accel.speculator.rejected_weight must be -1 (learned) or 0 to 100; got {self.rejected_weight}"
            )
        if not (self.advance_s == -1.0 or 0.0 <= self.advance_s < math.inf):
            raise ConfigError(
                f"rl_accel.speculator.advance_s must be -1 (by measured costs), or 0 and more; got {self.advance_s}"
            )
        for name in ("max_share", "max_trace_share"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ConfigError(f"rl_accel.speculator.{name} must be above 0, at most 1; got {getattr(self, name)}")

    @property
    def enabled(self) -> bool:
        return self.enable


def refuse_parallel(tensor: int, pipeline: int, error: type[Exception] = ConfigError) -> None:
    """Raise `error` for an engine of several GPUs: the draft's weights are not split."""
    if tensor > 1 or pipeline > 1:
        raise error(
            f"rl_accel.speculator.head=eagle3 drafts in engines of one device; tensor_parallel_size is {tensor} and "
            f"pipeline_parallel_size {pipeline}. Set both to 1, or rl_accel.speculator.head=recurrent"
        )


def refuse_history(method: str) -> None:
    """Raise ConfigError where history should draft beside it."""
    if method == "auto":
        raise ConfigError(
            "rl_accel.draft.method=auto asks history and head by turns, and rl_accel.speculator.head=eagle3 drafts by "
            "itself; set rl_accel.draft.method=head, or rl_accel.speculator.head=recurrent"
        )
