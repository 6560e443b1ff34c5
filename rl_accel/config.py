"""The `rl_accel.*` settings: one frozen dataclass per feature, validated in one place.

The same mapping is used by both entries: `python -m rl_accel.train` (block `rl_accel:` of a recipe) and the drop-in
form on a plain verl command (`+actor_rollout_ref.rollout.custom.rl_accel.*`).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

from rl_accel.comm.config import SDP4BitConfig
from rl_accel.errors import ConfigError

DRAFT_METHODS = ("none", "ngram", "suffix", "das")
DRAFT_POLICIES = ("budget", "classes", "fixed")
DRAFT_LENGTHS = {"none": 1, "ngram": 5, "suffix": 24, "das": 16}
"""Longest draft where none is set, by method; `suffix`: vLLM's own default, its tree depth."""

MAX_SEED = 2**32 - 2**16
"""numpy takes seeds of 32 bits, and hosts add the ranks of their processes."""
MAX_TIMEOUT_S = 1e7
"""Four months; a wait for longer overflows in some threading libraries."""

T = TypeVar("T")


@dataclass(frozen=True)
class DraftConfig:
    """Speculative decoding of rollouts (`rl_accel.draft.*`)."""

    method: str = "none"
    """`none`; `das`: rollout history with length-aware budgets; or one of vLLM's own: `ngram` (looks in the request
    itself), `suffix` (package arctic-inference)."""
    num_speculative_tokens: int | None = None
    """Most draft tokens per request and engine step, 1 to 128. None: 16 for `das`, 5 for `ngram`, 24 for `suffix`."""
    prompt_lookup_min: int = 2
    """`ngram`: shortest match, in tokens."""
    prompt_lookup_max: int = 4
    """`ngram`: longest match, in tokens."""
    policy: str = "budget"
    """`das`: how long drafts are. `budget`: as long as they pay by measured costs and predicted lengths; `classes`: the
    paper's long / medium / short; `fixed`: always as long as allowed."""
    window: int = 8
    """`das`: epochs of history that are kept, 1 to 8; fewer while old ones predict badly."""
    history_gib: float = 2.0
    """`das`: memory for history in each engine, GiB; the oldest epochs go first."""
    cross_problems: bool = True
    """`das`: also look into rollouts of other problems."""
    learn_from_validation: bool = False
    """`das`: let validation rollouts enter the history."""
    record: bool = False
    """Record every training rollout under `run_dir/rollouts.jsonl`, for `scripts/bench_draft.py`."""

    def __post_init__(self) -> None:
        if self.method not in DRAFT_METHODS:
            raise ConfigError(_unknown("rl_accel.draft.method", self.method, DRAFT_METHODS))
        if self.num_speculative_tokens is not None and not 1 <= self.num_speculative_tokens <= 128:
            raise ConfigError(
                f"rl_accel.draft.num_speculative_tokens is {self.num_speculative_tokens}; vLLM takes 1 to 128"
            )
        if not 1 <= self.prompt_lookup_min <= self.prompt_lookup_max:
            raise ConfigError(
                "rl_accel.draft.prompt_lookup_min and prompt_lookup_max must satisfy 1 <= min <= max; got "
                f"{self.prompt_lookup_min} and {self.prompt_lookup_max}"
            )
        if self.policy not in DRAFT_POLICIES:
            raise ConfigError(_unknown("rl_accel.draft.policy", self.policy, DRAFT_POLICIES))
        if not 1 <= self.window <= 8:
            raise ConfigError(f"rl_accel.draft.window must be 1 to 8 epochs; got {self.window}")
        if not (self.history_gib > 0 and math.isfinite(self.history_gib)):
            raise ConfigError(f"rl_accel.draft.history_gib must be positive and finite; got {self.history_gib}")

    @property
    def max_draft(self) -> int:
        """Longest draft in tokens: what was set, or the method's default."""
        return self.num_speculative_tokens or DRAFT_LENGTHS[self.method]


@dataclass(frozen=True)
class SamplingConfig:
    """Position-keyed exact sampling (`rl_accel.sampling.*`)."""

    exact: bool = False
    """Make every sampled token a pure function of (seed, problem, sample, step, position) and the logits."""
    seed: int = 0
    """Seed of the noise."""

    def __post_init__(self) -> None:
        _check_seed("rl_accel.sampling.seed", self.seed)


@dataclass(frozen=True)
class SyncConfig:
    """Safety of the weight sync from trainer to rollout engine (`rl_accel.sync.*`)."""

    timeout_s: float = 600.0
    """Seconds after which a sync without an answer is an error."""
    readback: str = "first"
    """Compare what the engine's kernels use with what was sent: `first` sync only, `every` sync, or `never`."""

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s <= MAX_TIMEOUT_S:
            raise ConfigError(
                f"rl_accel.sync.timeout_s must be more than 0 s and at most {MAX_TIMEOUT_S:g} s; got {self.timeout_s}"
            )
        if self.readback not in ("first", "every", "never"):
            raise ConfigError(_unknown("rl_accel.sync.readback", self.readback, ("first", "every", "never")))


OWNED_DS_KEYS = {
    "train_batch_size": "data.train_batch_size and actor.ppo_mini_batch_size",
    "train_micro_batch_size_per_gpu": "actor.ppo_micro_batch_size_per_gpu",
    "gradient_accumulation_steps": "actor.ppo_mini_batch_size and ppo_micro_batch_size_per_gpu",
    "managed_gradient_accumulation": "actor.ppo_mini_batch_size and ppo_micro_batch_size_per_gpu",
    "gradient_clipping": "actor.optim.clip_grad",
    "optimizer": "actor.optim",
    "scheduler": "actor.optim.lr_scheduler_type",
    "bf16": "actor.fsdp_config.dtype",
    "fp16": "actor.fsdp_config.dtype",
    "torch_autocast": "actor.fsdp_config.dtype",
    "zero_optimization.stage": "rl_accel.deepspeed.zero_stage",
    "tensor_parallel": "nothing: the engine shards by ZeRO only",
    "sequence_parallel_size": "nothing: the engine shards by ZeRO only",
}
"""Keys of a DeepSpeed configuration that follow from verl's settings -> where to set them."""


@dataclass(frozen=True)
class DeepSpeedConfig:
    """The training engine of `strategy=deepspeed` (`rl_accel.deepspeed.*`)."""

    zero_stage: int = 2
    """1: optimizer state is sharded over ranks, 2: and gradients, 3: and weights."""
    ds_config: dict = field(default_factory=dict)
    """DeepSpeed configuration of your own, merged last into the one that the engine makes."""

    def __post_init__(self) -> None:
        if self.zero_stage not in (1, 2, 3):
            raise ConfigError(f"rl_accel.deepspeed.zero_stage must be 1, 2 or 3; got {self.zero_stage}")
        for key, instead in OWNED_DS_KEYS.items():
            group, _, inner = key.partition(".")
            nested = self.ds_config.get(group)
            if group in self.ds_config and (not inner or (isinstance(nested, Mapping) and inner in nested)):
                raise ConfigError(f"rl_accel.deepspeed.ds_config.{key} is set by the engine; use {instead}")


@dataclass(frozen=True)
class CommConfig(SDP4BitConfig):
    """4-bit communication of the training engine (`rl_accel.comm.*`): `SDP4BitConfig` and a switch."""

    enable: bool = False
    """Needs strategy=fsdp2 or deepspeed. Lossy: see docs/communication.md for what it does to the loss."""

    def settings(self) -> dict[str, Any]:
        """The fields of `SDP4BitConfig` as plain values; empty where it is off."""
        return {name: value for name, value in asdict(self).items() if name != "enable"} if self.enable else {}


@dataclass(frozen=True)
class TraceConfig:
    """What a run keeps for `rl_accel.compare` (`rl_accel.trace.*`)."""

    tokens: bool = False
    """Save the token ids of every training rollout under `run_dir/tokens` (1 to 3 bytes per token on disk)."""


@dataclass(frozen=True)
class AccelConfig:
    """All settings of rl_accel. Source: ours."""

    seed: int = 0
    """Seed that a recipe derives its other seeds from."""
    run_dir: str | None = None
    """Folder of the run: metrics, tokens, checkpoints, plot. None: nothing of ours is written."""
    accept_changes: bool = False
    """Resume a run in `run_dir` also where settings differ from those that it began with."""
    draft: DraftConfig = field(default_factory=DraftConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    trace: TraceConfig = field(default_factory=TraceConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    comm: CommConfig = field(default_factory=CommConfig)

    def __post_init__(self) -> None:
        _check_seed("rl_accel.seed", self.seed)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any] | None) -> AccelConfig:
        """Build the settings from nested mappings.

        Raises:
            ConfigError: on an unknown key (with the nearest known one) or a value of the wrong type or range.
        """
        return build(cls, values or {}, "rl_accel")


def build(cls: type[T], values: Mapping[str, Any], prefix: str) -> T:
    """Build a settings dataclass; ConfigError on an unknown key or a wrong type."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix} must be a group of settings; got {values!r}")
    hints = get_type_hints(cls)
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    kwargs = {}
    for key, value in values.items():
        if key not in names:
            raise ConfigError(_unknown(prefix, key, names, what="setting"))
        kwargs[key] = _convert(hints[key], value, f"{prefix}.{key}")
    return cls(**kwargs)


def _convert(expected: Any, value: Any, name: str) -> Any:
    if is_dataclass(expected):
        return build(expected, value, name)  # type: ignore[arg-type]
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if expected in (int, int | None) and isinstance(value, bool):
        raise ConfigError(f"{name} must be int; got {value!r}")
    if not isinstance(value, expected):
        raise ConfigError(f"{name} must be {getattr(expected, '__name__', expected)}; got {value!r}")
    return value


def leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of nested mappings with its full name; an empty group counts as one."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_seed(name: str, seed: int) -> None:
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"{name} must be 0 to {MAX_SEED}; got {seed}")


def _unknown(name: str, value: str, choices: Any, what: str = "value") -> str:
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{name}: unknown {what} {value!r}.{hint} Known: {', '.join(choices)}"
