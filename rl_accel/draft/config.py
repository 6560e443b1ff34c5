"""Settings of speculative decoding, `rl_accel.draft.*`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rl_accel.config import unknown
from rl_accel.errors import ConfigError

DRAFT_METHODS = ("none", "ngram", "suffix", "model", "das", "head", "auto", "ahead")
OUR_METHODS = ("das", "head", "auto", "ahead")
"""Those that our proposer serves."""
HISTORY_METHODS = ("das", "auto")
"""Those that draft from history."""
HEAD_METHODS = ("head", "auto")
"""Those that ask the head of `rl_accel.speculator`."""
SOURCE_METHODS = (*HEAD_METHODS, "ahead")
"""Those that draft from something else than history, maybe beside it (`combined.py`)."""
MODEL_METHODS = ("model", "ahead")
"""Those that draft by a smaller language model."""
MAX_PADDING = 0.01
"""Of a vocabulary, as a share."""
VLLM_HEADS = ("eagle3",)
"""Kinds of that head with which vLLM itself drafts, by method `head`; also its names for them."""
DRAFT_POLICIES = ("budget", "classes", "fixed")
DRAFT_LENGTHS = {"none": 1, "ngram": 5, "suffix": 24, "model": 5, "das": 16, "head": 8, "auto": 16, "ahead": 32}
"""Longest draft where none is set, by method; `suffix`: vLLM's own default, its tree depth."""


def other_vocabulary(draft_size: int, policy_size: int) -> str | None:
    """Return what is wrong where two vocabularies cannot be of one tokenizer; its models are padded to other sizes."""
    if abs(draft_size - policy_size) <= MAX_PADDING * policy_size:
        return None
    return (
        f"rl_accel.draft.model has a vocabulary of {draft_size} tokens, the policy one of {policy_size}; drafts are "
        "token ids, so both need the same tokenizer"
    )


@dataclass(frozen=True)
class DraftConfig:
    """Speculative decoding of rollouts (`rl_accel.draft.*`)."""

    method: str = "none"
    """`none`; `das`: rollout history with length-aware budgets; `head`: a small model that learns from the rollouts
    (`rl_accel.speculator`); `auto`: whichever of the two is worth more, per request and step; `ahead`: a smaller
    language model that goes on writing in a process of its own while the policy verifies; or one of vLLM's own:
    `ngram` (looks in the request itself), `suffix` (package arctic-inference), `model` (a smaller language model)."""
    model: str | None = None
    """`model`, `ahead`: folder or hub name of the smaller model, with the policy's tokenizer."""
    num_speculative_tokens: int | None = None
    """Most draft tokens per request and engine step, 1 to 128. None: 16 for `das` and `auto`, 32 for
    `ahead`, 8 for `head` (3 where vLLM drafts with it), 5 for `model` and `ngram`, 24 for `suffix`."""
    prompt_lookup_min: int = 2
    """`ngram`: shortest match, in tokens."""
    prompt_lookup_max: int = 4
    """`ngram`: longest match, in tokens."""
    policy: str = "budget"
    """Of all but vLLM's own: how long drafts are. `budget`: as long as is worth it by measured costs and predicted
    lengths; `classes`: the paper's long / medium / short; `fixed`: always as long as allowed."""
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
            raise ConfigError(unknown("rl_accel.draft.method", self.method, DRAFT_METHODS))
        if (self.method in MODEL_METHODS) != (self.model is not None):
            raise ConfigError(
                f"rl_accel.draft.method={' and '.join(MODEL_METHODS)} draft by the model that rl_accel.draft.model "
                f"names; set both or neither; got method={self.method} and model={self.model}"
            )
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
            raise ConfigError(unknown("rl_accel.draft.policy", self.policy, DRAFT_POLICIES))
        if not 1 <= self.window <= 8:
            raise ConfigError(f"rl_accel.draft.window must be 1 to 8 epochs; got {self.window}")
        if not (self.history_gib > 0 and math.isfinite(self.history_gib)):
            raise ConfigError(f"rl_accel.draft.history_gib must be positive and finite; got {self.history_gib}")

    @property
    def enabled(self) -> bool:
        return self.method != "none"

    @property
    def max_draft(self) -> int:
        """Longest draft in tokens: what was set, or the method's default."""
        return self.num_speculative_tokens or DRAFT_LENGTHS[self.method]
