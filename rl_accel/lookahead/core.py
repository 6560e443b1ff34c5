"""Lookahead decoding of one text: drafts run ahead, target steps run in parallel behind them, agreeing steps are kept.

The target's step at a position begins as soon as the draft of the position before is there; it does not wait for that
draft to be verified. When it is done it is compared with the draft of its own position. Agreed: the draft is final, and
the next position is already being written. Not agreed: the target's step is final, and everything behind it is
cancelled. A draft that is not there when the target's step is counts as not agreed.

With a lossless verifier the text is the one that the target alone would write, whatever drafts are: to the token with
exact sampling, whose noise is keyed by position.

Cost: up to `depth` target steps at a time, of which the part behind a mismatch is thrown away. Leaves out: batches of
texts (callers run one generator each), and several drafts at other positions than the next one.

Source: Lookahead Reasoning (arXiv 2506.19830) §3, its asynchronous form; differs: waits on events instead of polling,
token ids end to end, verdicts of several positions at a time, the end of a text inside a draft, exactness.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from rl_accel.lookahead.step import Engine, Step, Verifier

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """Of one text."""

    max_tokens: int
    """Of the whole answer."""
    step_tokens: int = 256
    """Of one step; a longer one is cut and goes on as the next."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.step_tokens < 1:
            raise ValueError(f"limits are at least 1 token; got {self}")


@dataclass
class Counts:
    """What a text took; the caller may share one object between texts."""

    target_steps: int = 0
    """Begun, cancelled ones included."""
    draft_steps: int = 0
    compared: int = 0
    accepted: int = 0
    late_drafts: int = 0
    """Not there when the target's step was."""
    drafts_lost: int = 0
    """Texts whose draft engine failed; they went on without drafts."""
    draft_error: str = ""
    """What the last failure was."""
    target_s: list[float] = field(default_factory=list)
    """Seconds of target steps that came to their end."""
    draft_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class FinalStep:
    """A step of the answer."""

    step: Step
    from_draft: bool


class _Position:
    """A step that is not verified yet: the target's task, tasks of its drafts, and what is written behind them."""

    def __init__(self, prefix_ids: tuple[int, ...], max_tokens: int):
        self.prefix_ids, self.max_tokens = prefix_ids, max_tokens
        self.hint: asyncio.Future[tuple[int, ...]] = asyncio.get_running_loop().create_future()
        """What the target's request waits for; empty without a hint."""
        self.target: asyncio.Task[Step] | None = None
        self.drafts: list[asyncio.Task[Step]] = []
        self.verdict: asyncio.Task[tuple[Step, int | None]] | None = None
        self.behind: dict[int, _Position] = {}
        """Number of a draft -> the position behind it. Those of draft 0 are in the chain."""

    def tasks(self) -> list[asyncio.Task]:
        """Return all tasks of it and of positions behind other drafts than the first."""
        found = [*self.drafts, *(task for task in (self.target, self.verdict) if task is not None)]
        return found + [task for number, position in self.behind.items() if number for task in position.tasks()]


class Lookahead:
    """The generator of one text. Use once; `steps()` is the way through it."""

    def __init__(
        self,
        target: Engine,
        draft: Engine,
        verifier: Verifier,
        limits: Limits,
        depth: Callable[[], int],
        *,
        width: int = 1,
        hint: bool = False,
        counts: Counts | None = None,
    ):
        """
        Args:
            depth: target steps that may run at a time, asked whenever there is a choice; 1 asks for no drafts.
            width: drafts of the next position; each beyond the first costs a draft step and a target step.
            hint: begin a target step when its own draft is there, and give it that as a token draft.
        """
        self.target, self.draft, self.verifier, self.limits, self.depth = target, draft, verifier, limits, depth
        self.width, self.hint, self.counts = width, hint, counts if counts is not None else Counts()
        self._positions: deque[_Position] = deque()
        self._moved = asyncio.Event()
        self._live: set[asyncio.Task] = set()
        self._drafting: asyncio.Task | None = None
        self._draft_lost = False
        self._end = 0
        """Length of prompt and answer at which the answer is cut."""

    async def steps(self, prompt_ids: Sequence[int]) -> AsyncGenerator[FinalStep, None]:
        """Yield the steps of the answer as they become final; closing the generator cancels every request.

        Raises:
            Exception: what the target's engine raises. Failures of the draft's are counted and survived.
        """
        prefix = tuple(prompt_ids)
        self._end = len(prefix) + self.limits.max_tokens
        try:
            self._restart(self._new_position(prefix))
            while True:
                position = self._positions[0]
                assert position.verdict is not None
                own, accepted = await position.verdict
                final = own
                if accepted is not None and not self.verifier.lossless:
                    final = position.drafts[accepted].result()
                prefix = position.prefix_ids + final.token_ids
                if final.end or len(prefix) >= self._end:
                    await self._cancel_all()
                    yield FinalStep(final, accepted is not None)
                    return
                self._advance(position, prefix, accepted)
                yield FinalStep(final, accepted is not None)
        finally:
            await self._cancel_all()

    # The chain of positions.

    def _advance(self, position: _Position, prefix: tuple[int, ...], accepted: int | None) -> None:
        if accepted == 0:
            self._follow(position, prefix)
            self._positions.popleft()
            _cancel(position.tasks())  # other drafts
            self._moved.set()
        else:
            behind = position.behind.pop(accepted, None) if accepted is not None else None
            self._restart(behind or self._new_position(prefix))

    def _restart(self, first: _Position) -> None:
        """Begin anew with a position; what was begun otherwise is cancelled."""
        if self._drafting is not None:
            self._drafting.cancel()
        _cancel([task for position in self._positions for task in position.tasks()])
        self._positions.clear()
        self._append(first)
        self._drafting = self._start(self._draft_ahead(first))

    def _follow(self, position: _Position, prefix: tuple[int, ...]) -> _Position:
        """Return the position behind draft 0 of one; it is begun if it was not."""
        if 0 not in position.behind:
            position.behind[0] = self._new_position(prefix)
            self._append(position.behind[0])
        return position.behind[0]

    def _append(self, position: _Position) -> None:
        self._positions.append(position)
        position.verdict = self._start(self._judge(position))

    def _new_position(self, prefix: tuple[int, ...]) -> _Position:
        position = _Position(prefix, min(self.limits.step_tokens, self._end - len(prefix)))
        position.target = self._start(self._write(position))
        if not (self.hint and self._may_draft()):
            position.hint.set_result(())
        return position

    async def _write(self, position: _Position) -> Step:
        """Have the target write a step, when it has its hint."""
        hint = await position.hint
        self.counts.target_steps += 1
        request = partial(self.target.step, position.prefix_ids, position.max_tokens, hint=hint)
        return await _timed(request, self.counts.target_s)

    # Drafts.

    def _may_draft(self) -> bool:
        return not self._draft_lost and self.depth() > 1

    async def _draft_ahead(self, position: _Position) -> None:
        """Write one draft after the other; each that is whole lets the target begin behind it."""
        try:
            while self._may_draft():
                step = await self._draft_of(position)
                _give(position, step.token_ids)
                prefix = position.prefix_ids + step.token_ids
                if not step.whole or step.end or len(prefix) >= self._end:
                    return
                while 0 not in position.behind and len(self._positions) >= self.depth():
                    self._moved.clear()
                    await self._moved.wait()
                position = self._follow(position, prefix)
        except Exception as error:
            self._lose_draft(error)
        finally:
            _give(position, ())

    async def _draft_of(self, position: _Position) -> Step:
        """Return the draft of a position; other drafts of the next one to be verified are begun beside it."""
        for number in range(self.width if position is self._positions[0] else 1):
            self.counts.draft_steps += 1
            request = partial(self.draft.step, position.prefix_ids, position.max_tokens, branch=number)
            task = self._start(_timed(request, self.counts.draft_s))
            position.drafts.append(task)
            if number:
                task.add_done_callback(partial(self._follow_other, position, number))
        return await position.drafts[0]

    def _follow_other(self, position: _Position, number: int, done: asyncio.Task[Step]) -> None:
        """Let the target begin behind another draft than the first."""
        if not _has_result(done) or not self._positions or position is not self._positions[0]:
            return
        step = done.result()
        prefix = position.prefix_ids + step.token_ids
        if step.whole and not step.end and len(prefix) < self._end:
            position.behind[number] = other = self._new_position(prefix)
            _give(other, ())

    def _lose_draft(self, error: Exception) -> None:
        """The draft engine failed: this text goes on without it."""
        logger.debug("rl_accel: lookahead: the draft engine failed", exc_info=True)
        self.counts.drafts_lost += 1
        self.counts.draft_error = f"{type(error).__name__}: {error}"
        self._draft_lost = True
        for position in self._positions:
            _give(position, ())

    # Verdicts.

    async def _judge(self, position: _Position) -> tuple[Step, int | None]:
        """Return the target's step, and the number of the draft that stands for it, or None."""
        assert position.target is not None
        own = await position.target
        if not own.whole or not position.drafts:
            return own, None
        self.counts.compared += 1
        self.counts.late_drafts += not position.drafts[0].done()
        for number, task in enumerate(position.drafts):
            if not _has_result(task):
                continue
            step = task.result()
            if step.whole and step.end == own.end and await self.verifier.agree(position.prefix_ids, step, own):
                self.counts.accepted += 1
                return own, number
        return own, None

    # Tasks.

    def _start(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(coroutine)
        self._live.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task) -> None:
        self._live.discard(task)
        if not task.cancelled():
            task.exception()  # nobody may have waited for it; asyncio would log it

    async def _cancel_all(self) -> None:
        live = list(self._live)
        self._positions.clear()
        _cancel(live)
        await asyncio.gather(*live, return_exceptions=True)


def _give(position: _Position, hint: tuple[int, ...]) -> None:
    """Let the target's request go, if it still waits."""
    if not position.hint.done():
        position.hint.set_result(hint)


async def _timed(request: Callable[[], Awaitable[Step]], seconds: list[float]) -> Step:
    clock = asyncio.get_running_loop().time
    started = clock()
    step = await request()
    seconds.append(clock() - started)
    return step


def _has_result(task: asyncio.Task) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def _cancel(tasks: Iterable[asyncio.Task]) -> None:
    for task in tasks:
        task.cancel()
