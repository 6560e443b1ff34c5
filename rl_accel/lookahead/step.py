"""What the core of lookahead speaks to: engines that write one step, and verifiers that compare two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Step:
    """One reasoning step as an engine wrote it."""

    token_ids: tuple[int, ...]
    """The delimiter or the end token is the last one."""
    end: bool = False
    """The text ends here: an end token was sampled."""
    whole: bool = True
    """False: cut by the cap on its length. Never accepted as a draft, and no draft is accepted for it."""
    logprobs: tuple[float, ...] = ()
    """Of its tokens where the engine reports them, else empty."""


class Engine(Protocol):
    """Writes the next step of a text; cancelling the coroutine ends the request in the engine."""

    async def step(
        self, prefix_ids: Sequence[int], max_tokens: int, *, branch: int = 0, hint: Sequence[int] = ()
    ) -> Step:
        """Return the step after `prefix_ids`, of at most `max_tokens` tokens.

        Args:
            branch: number of the sample where several of one prefix are wanted; 0 is the one that plain decoding has.
            hint: tokens that the step may begin with, for the engine's own token speculation.
        """
        ...


@dataclass
class Cost:
    """What a verifier asked of a model, over all its verdicts; cancelled ones are in it."""

    calls: int = 0
    """Verdicts for which a model was asked."""
    seconds: float = 0.0
    """From question to verdict, summed; verdicts may run beside each other."""
    failures: int = 0
    """Calls without a usable answer: not agreed."""
    tokens: int = 0
    """Sent, prefixes included, as far as servers report them."""


class Verifier(Protocol):
    """Decides whether a draft stands for what the target wrote."""

    lossless: bool
    """Whether accepting a draft leaves the target's tokens as they are."""

    async def agree(self, prefix_ids: Sequence[int], draft: Step, target: Step) -> bool:
        """Compare two whole steps after the same prefix."""
        ...
