"""Whether and how far ahead: learned by serving all texts with drafts for a while, and all without.

Requests beside each other are free only while an engine has cores, or memory bandwidth, to spare; beyond that the extra
steps of one text are paid by the others. So texts are not compared with each other but phases are, in which every text
is served the same way: seconds a token are kept for each power of two of texts at a time, and the faster way is taken.
The slower one gets a phase now and then, more rarely the slower it was.

The depth of a text with drafts follows from what a draft's step takes beside the target's: beyond their ratio nothing
is gained (`formulas.full_depth`).

Source: ours.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

from rl_accel.lookahead import formulas
from rl_accel.lookahead.core import Counts

logger = logging.getLogger(__name__)

DECAY = 0.7
MIN_GAIN = 1.03
"""Of drafts, in seconds a token: what is less is noise, and costs the engine more."""
MEMORY = 16
"""Beginnings that the mean number of texts at a time is of."""
PHASE_TEXTS = 4
"""Of a phase at least, beside those that began in the phase before."""
MIN_PAUSE, MAX_PAUSE = 8, 200
"""Phases between two of the slower way."""


@dataclass
class _Load:
    """What was seen at about one number of texts at a time."""

    seconds_per_token: dict[bool, float] = field(default_factory=dict)
    """With drafts or without -> mean of phases, recent ones more."""
    drafts: bool = False
    phase: int = 0
    since_other: int = 0
    seen: list[float] = field(default_factory=list)
    to_skip: int = 0

    def gain(self) -> float:
        """Return the speed-up by drafts, 0 where it is not known yet."""
        if len(self.seconds_per_token) < 2:
            return 0.0
        return self.seconds_per_token[False] / self.seconds_per_token[True]

    def add(self, seconds_per_token: float, active: int) -> None:
        """Note a text of this phase; begin the next phase if these are enough."""
        if self.to_skip > 0:
            self.to_skip -= 1
            return
        self.seen.append(seconds_per_token)
        if len(self.seen) < max(PHASE_TEXTS, active):
            return
        mean, before = sum(self.seen) / len(self.seen), self.seconds_per_token.get(self.drafts)
        self.seconds_per_token[self.drafts] = mean if before is None else DECAY * before + (1 - DECAY) * mean
        self._next_phase(active)

    def _next_phase(self, active: int) -> None:
        gain = self.gain()
        best = gain >= MIN_GAIN if gain else not self.drafts
        self.since_other = self.since_other + 1 if self.drafts == best else 0
        if gain and self.since_other > min(MAX_PAUSE, MIN_PAUSE + int(100 * (max(gain, 1 / gain) - 1))):
            best = not best
        self.seen = []
        if best != self.drafts:
            self.drafts, self.to_skip = best, active
            self.phase += 1


class Text:
    """One text that is being served; tell it when it has ended."""

    def __init__(self, switch: Switch, load: _Load, drafts: bool):
        self._switch, self._load, self._phase, self.drafts = switch, load, load.phase, drafts
        self.counts = Counts()
        self._ended = False

    def depth(self) -> int:
        """Return the target steps that may run at a time; for `Lookahead`."""
        return self._switch.depth(self.counts) if self.drafts else 1

    def end(self, num_tokens: int, seconds: float) -> None:
        """Note a text that came to its end; one that was cancelled ends with 0 tokens."""
        if self._ended:
            return
        self._ended = True
        self._switch.active -= 1
        fits = self._phase == self._load.phase and self.drafts == self._load.drafts
        if num_tokens > 0 and not self.counts.drafts_lost and fits:
            self._load.add(seconds / num_tokens, self._switch.active)
        self._switch.learn(self.counts)
        self._switch.watch(self.counts)


class Switch:
    """Shared by all texts of a process."""

    def __init__(self, max_depth: int, always: bool = False):
        """
        Args:
            max_depth: target steps at a time of one text, whatever the draft takes.
            always: drafts for every text; nothing is tried.
        """
        if max_depth < 1:
            raise ValueError(f"max_depth is at least 1; got {max_depth}")
        self.max_depth, self.always, self.active = max_depth, always, 0
        self._mean_active = 0.0
        """Texts at a time, over recent beginnings: texts come in bursts, and the first of one is not alone for long."""
        self._loads: dict[int, _Load] = {}
        self._lost = False
        self._ratio = 0.0
        """Seconds of a draft's step over the target's; 0: not known."""

    def begin(self) -> Text:
        """Choose the way of a text that begins now."""
        self.active += 1
        self._mean_active += (self.active - self._mean_active) / (MEMORY if self._mean_active else 1)
        load = self._loads.setdefault(round(math.log2(self._mean_active)), _Load())
        return Text(self, load, self.max_depth > 1 and (self.always or load.drafts))

    def depth(self, counts: Counts) -> int:
        ratio = self._ratio or _ratio_of(counts)
        return min(self.max_depth, max(2, formulas.full_depth(ratio))) if ratio else self.max_depth

    def learn(self, counts: Counts) -> None:
        ratio = _ratio_of(counts)
        if ratio:
            self._ratio = DECAY * self._ratio + (1 - DECAY) * ratio if self._ratio else ratio

    def watch(self, counts: Counts) -> None:
        """Say once that the draft engine is gone, and once that it is back."""
        if counts.drafts_lost and not self._lost:
            logger.warning(
                "rl_accel: lookahead: the draft engine failed (%s); decoding goes on without drafts", counts.draft_error
            )
        elif counts.draft_s and not counts.drafts_lost and self._lost:
            logger.warning("rl_accel: lookahead: the draft engine is back")
        self._lost = bool(counts.drafts_lost) or (self._lost and not counts.draft_s)

    def gains(self) -> dict[int, float]:
        """Return texts at a time (powers of two) -> speed-up by drafts, where both ways were tried."""
        return {1 << load: found.gain() for load, found in sorted(self._loads.items()) if found.gain()}


def _ratio_of(counts: Counts) -> float:
    """Medians: a step that waits behind a prompt says nothing."""
    if not counts.target_s or not counts.draft_s:
        return 0.0
    target, draft = sorted(counts.target_s), sorted(counts.draft_s)
    middle = target[len(target) // 2]
    return draft[len(draft) // 2] / middle if middle > 0 else 0.0
