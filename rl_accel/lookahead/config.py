"""Settings of lookahead decoding under verl, `rl_accel.lookahead.*`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from rl_accel.config import unknown
from rl_accel.errors import ConfigError
from rl_accel.lookahead.verifiers import LOSSLESS, check_verifier

PHASES = ("validation", "training", "all")


@dataclass(frozen=True)
class LookaheadConfig:
    """Step-level speculation by a smaller model (`rl_accel.lookahead.*`)."""

    draft: str | None = None
    """The model that writes ahead: URL of a vLLM server, or a folder or hub name, for which the run starts a server of
    its own. It has the policy's tokenizer. None: off."""
    draft_args: str = ""
    """More arguments of that server, as `vllm serve` takes them."""
    draft_gpus: float = 0.0
    """GPUs of that server, in Ray's count; a URL needs none of ours."""
    phases: str = "validation"
    """Rollouts that are written so: `validation`, `training` or `all`."""
    verifier: str = "exact"
    """When a draft stands for the policy's own step. `exact`: the same tokens, lossless. Others are lossy:
    `numbers`, `likelihood`, `hidden`, `judge`, and the controls `random` and `always`."""
    verifier_url: str | None = None
    """`hidden`: a vLLM pooling server; `judge`: a server of the OpenAI API."""
    verifier_model: str | None = None
    """`judge`: its model."""
    threshold: float | None = None
    """`likelihood`: nats that a draft may be less likely; `hidden`: least cosine; `random`: probability."""
    depth: int = 8
    """Steps of one text that may be written at a time, at most; fewer where the draft is slow."""
    width: int = 1
    """Drafts of the next step."""
    hint: bool = False
    """Also give the policy's engine each draft as its token draft; `draft.method` is then `das`, `head` or `auto`."""
    delimiter: str = "\n"
    """Text that ends a step."""
    step_tokens: int = 256
    """Longest step."""
    adaptive: bool = True
    """Write without drafts where that is measured to be faster."""

    def __post_init__(self) -> None:
        if self.phases not in PHASES:
            raise ConfigError(unknown("rl_accel.lookahead.phases", self.phases, PHASES))
        check_verifier(self.verifier, self.verifier_url, self.threshold)
        for name in ("depth", "width", "step_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"rl_accel.lookahead.{name} must be at least 1; got {getattr(self, name)}")
        if not self.delimiter:
            raise ConfigError("rl_accel.lookahead.delimiter is empty; steps would never end")
        if not self.draft_gpus >= 0:
            raise ConfigError(f"rl_accel.lookahead.draft_gpus must not be negative; got {self.draft_gpus}")
        try:
            shlex.split(self.draft_args)
        except ValueError as error:
            raise ConfigError(f"rl_accel.lookahead.draft_args={self.draft_args!r}: {error}") from None

    @property
    def enabled(self) -> bool:
        return self.draft is not None

    @property
    def lossless(self) -> bool:
        return self.verifier in LOSSLESS

    def serves(self, validate: bool) -> bool:
        """Return whether rollouts of validation, or of training, are written so."""
        return self.phases == "all" or self.phases == ("validation" if validate else "training")
