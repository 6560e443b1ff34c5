"""The suffix index by its definition: brute force over texts, for tests. Quadratic; nothing is cached.

Same names and calls as `SuffixIndex` for what it has: begin, append, end, close_epoch, drop_before, inspect. What may
be drafted: `continuations`, the multiset of tokens that followed the longest match, and `successors`, those that ever
followed the last token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

START = -1
MAX_CONTEXT = 64
MAX_CLOSED = 8


@dataclass
class _Request:
    problem: int
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    kept: bool = False
    archived: bool = False


class NaiveIndex:
    """Live and closed rollouts by problem."""

    def __init__(self) -> None:
        self._requests: list[_Request] = []
        self._live: dict[int, list[_Request]] = {}
        self._closed: list[tuple[int, dict[int, list[list[int]]]]] = []
        self._attached: dict[int, list[int]] = {}
        self._min_epoch = -(1 << 62)

    def begin(self, problem: int, prompt: Sequence[int]) -> int:
        if problem not in self._live:
            self._live[problem] = []
            order = sorted(range(len(self._closed)), key=lambda i: self._closed[i][0], reverse=True)
            self._attached[problem] = [
                i for i in order if problem in self._closed[i][1] and self._closed[i][0] >= self._min_epoch
            ][:MAX_CLOSED]
        request = _Request(problem, list(prompt))
        self._live[problem].append(request)
        self._requests.append(request)
        return len(self._requests) - 1

    def append(self, handle: int, tokens: Sequence[int]) -> None:
        self._requests[handle].tokens.extend(tokens)

    def end(self, handle: int, keep: bool = True) -> None:
        request = self._requests[handle]
        request.ended, request.kept = True, keep and bool(request.tokens)
        self._forget_idle(request.problem)

    def close_epoch(self, epoch: int) -> None:
        texts: dict[int, list[list[int]]] = {}
        for problem, requests in self._live.items():
            for request in requests:
                if request.ended and request.kept and not request.archived:
                    texts.setdefault(problem, []).append([START, *request.tokens])
                    request.archived = True
        if texts:
            self._closed.append((epoch, texts))
        for problem in list(self._live):
            self._forget_idle(problem)

    def drop_before(self, epoch: int) -> None:
        self._min_epoch = max(self._min_epoch, epoch)

    def inspect(self, handle: int) -> dict:
        """Return `live_len`, `live_count` and `closed` [(epoch, match length, occurrences)] as `SuffixIndex` does."""
        length, count, _ = self._live_match(self._requests[handle])
        closed = []
        for i in self._attached[self._requests[handle].problem]:
            epoch, texts = self._closed[i]
            if epoch < self._min_epoch:
                continue
            found = self._closed_match(self._requests[handle], texts[self._requests[handle].problem])
            closed.append((epoch, found[0], sum(found[1].values())))
        return {"live_len": length, "live_count": count, "closed": closed}

    def continuations(self, handle: int) -> tuple[Counter, list[Counter]]:
        """Return what followed the longest match: in the live tier, and in each attached epoch that was not dropped."""
        request = self._requests[handle]
        closed = [self._closed_match(request, texts)[1] for texts in self._closed_texts(request.problem)]
        return self._live_match(request)[2], closed

    def successors(self, handle: int, draft: Sequence[int] = ()) -> set[int]:
        """Return what ever followed the last token of the request and a draft, wherever the request may draft from."""
        request = self._requests[handle]
        live_last = [*request.prompt, *request.tokens, *draft][-1:]
        closed_last = [START, *request.tokens, *draft][-1]
        found = {b for text, _ in self._texts(request.problem) for a, b in pairwise(text) if [a] == live_last}
        for texts in self._closed_texts(request.problem):
            found |= {b for text in texts for a, b in pairwise(text) if a == closed_last}
        return found

    def _forget_idle(self, problem: int) -> None:
        requests = self._live[problem]
        if all(r.ended and (r.archived or not r.kept) for r in requests):
            del self._live[problem]

    def _live_match(self, request: _Request) -> tuple[int, int, Counter]:
        """Longest suffix of the own text that was continued somewhere; its occurrences; what continued it."""
        texts = self._texts(request.problem)
        own = request.prompt + request.tokens
        for length in range(len(own), 0, -1):
            suffix = own[len(own) - length :]
            ends = {
                ("prompt" if end <= shared else name, end)
                for name, (text, shared) in enumerate(texts)
                for end in range(length, len(text) + 1)
                if text[end - length : end] == suffix
            }
            following: Counter[int] = Counter()
            for text, _ in texts:
                for end in range(length, len(text)):
                    if text[end - length : end] == suffix:
                        following[text[end]] += 1
            if following:
                return length, len(ends), following
        return 0, 0, Counter()

    def _texts(self, problem: int) -> list[tuple[list[int], int]]:
        """Prompt and tokens of every rollout, and how much of it is the problem's prompt, which counts once for all."""
        requests = self._live[problem]
        return [(r.prompt + r.tokens, len(r.prompt) if r.prompt == requests[0].prompt else 0) for r in requests]

    def _closed_texts(self, problem: int) -> list[list[list[int]]]:
        """Rollouts of the problem in each attached epoch that was not dropped since."""
        attached = [self._closed[i] for i in self._attached[problem]]
        return [texts[problem] for epoch, texts in attached if epoch >= self._min_epoch]

    def _closed_match(self, request: _Request, texts: list[list[int]]) -> tuple[int, Counter]:
        context = ([START, *request.tokens])[-MAX_CONTEXT:]
        for length in range(len(context), 0, -1):
            suffix = context[len(context) - length :]
            following = Counter(
                text[end] for text in texts for end in range(length, len(text)) if text[end - length : end] == suffix
            )
            if following:
                return length, following
        return 0, Counter()
