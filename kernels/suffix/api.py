"""The suffix index as Python sees it: flat numpy arrays in, drafts out, `DraftError` for everything it refuses.

The work is done in C++ (`csrc`). Its naive twin for tests is `reference.py`.
Cost: one call per engine step for all requests, without Python's lock; 2 to 7 us a request that drafts 18 tokens.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from rl_accel.errors import DraftError, NotLiveError

try:
    from rl_accel.kernels.suffix import _suffix  # type: ignore[import-not-found]
except ImportError as _error:  # the extension was not built; said where it is needed, not on import
    _suffix = None
    _import_error: ImportError | None = _error

F = TypeVar("F", bound=Callable[..., Any])
SOURCES: tuple[str, ...] = _suffix.SOURCES if _suffix else ()
"""Where a draft's first token came from, in the order of the numbers in `take_stats`."""
MATCH_LENGTHS: tuple[str, ...] = _suffix.MATCH_LENGTHS if _suffix else ()
"""Match lengths in tokens, likewise."""
MAX_DRAFT = 128
"""vLLM verifies no longer drafts (`MAX_SPEC_LEN`)."""
NO_CAPTURE_SIZES = np.zeros(0, np.uint32)
UNBOUNDED = 1 << 62


def problem_key(problem: str | int | bytes | Sequence[int]) -> int:
    """Return the key of a problem, 63 bits: of its name, or of its prompt's token ids."""
    if isinstance(problem, (int, np.integer)):
        data = b"i" + int(problem).to_bytes(16, "little", signed=True)
    elif isinstance(problem, str):
        data = b"s" + problem.encode()
    elif isinstance(problem, bytes):
        data = b"b" + problem
    else:
        data = b"p" + np.asarray(problem, dtype=np.int64).tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def _draft_errors(call: F) -> F:
    @functools.wraps(call)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except _suffix.SuffixError as error:
            raise DraftError(str(error)) from None

    return wrapped  # type: ignore[return-value]


class SuffixIndex:
    """Live and closed rollouts of all problems; see `kernels/suffix/README.md` for structure and maths.

    Args:
        tokenizer: 64-bit fingerprint of the tokenizer; segments of another one are refused.
        max_draft: longest draft, 1 to 128 tokens.
        max_closed: closed epochs that a request looks into, newest first, at most 8.
        min_probability: a draft ends where its path becomes less likely than this.
        stop_token_ids: nothing is drafted behind these.
        cross_tokens: tokens in each of two generations of the index over all problems; 0: none.
        max_bytes: of all that is held together, whenever a call returns, without 2 KB for each request that ran at
            once. What goes first is said in `kernels/suffix/csrc/budget.cpp` and counted by `take_stats`.

    Raises:
        NotLiveError: if the C++ extension is not built.
    """

    def __init__(
        self,
        *,
        tokenizer: int = 0,
        max_draft: int = 32,
        max_closed: int = 8,
        min_probability: float = 0.001,
        stop_token_ids: Sequence[int] = (),
        cross_tokens: int = 1 << 18,
        max_bytes: int = UNBOUNDED,
    ):
        if _suffix is None:
            raise NotLiveError(
                f"the C++ extension rl_accel.kernels.suffix cannot be imported ({_import_error}); reinstall rl-accel"
            )
        if not 1 <= max_draft <= MAX_DRAFT:
            raise DraftError(f"max_draft must be 1 to {MAX_DRAFT}; got {max_draft}")
        self._index = _suffix.SuffixIndex(
            tokenizer=tokenizer,
            max_draft=max_draft,
            max_closed=max_closed,
            min_probability=min_probability,
            stop_tokens=list(stop_token_ids),
            cross_tokens=cross_tokens,
            max_bytes=min(max_bytes, UNBOUNDED),
        )

    @_draft_errors
    def begin(self, problem: int, prompt_token_ids: Sequence[int] | npt.NDArray[np.int32]) -> int:
        """Start a request; returns its handle. `problem` is a key of `problem_key`."""
        return self._index.begin(problem, np.ascontiguousarray(prompt_token_ids, dtype=np.int32))

    @_draft_errors
    def end(self, handle: int, keep: bool = True) -> None:
        """End a request. With `keep` its tokens go into the next closed epoch."""
        self._index.end(handle, keep)

    @_draft_errors
    def propose_batch(
        self,
        handles: npt.NDArray[np.int64],
        new_token_ids: npt.NDArray[np.int32],
        offsets: npt.NDArray[np.uint32],
        max_draft_tokens: npt.NDArray[np.uint32],
        min_path_probs: npt.NDArray[np.float32],
        capture_sizes: npt.NDArray[np.uint32] = NO_CAPTURE_SIZES,
        break_even_gain: float = 0.0,
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint32], npt.NDArray[np.float32]]:
        """Take new tokens, then draft, for n requests in one call.

        Args:
            handles: int64 [n], each once.
            new_token_ids: int32 [T], what the requests gained since the last call; those of request i are
                `new_token_ids[offsets[i]:offsets[i + 1]]`.
            offsets: uint32 [n + 1].
            max_draft_tokens: uint32 [n], longest draft of each request; 0 only appends.
            min_path_probs: float32 [n], least probability of a draft's path; above 1 nothing is drafted.
            capture_sizes: uint32, ascending: sizes (requests + draft tokens) a step should fill; the last is a limit.
            break_even_gain: the gain of a draft token is path probability / min_path_prob - 1; nothing is drafted
                where those of all admitted tokens sum to less than this.

        Returns:
            Draft tokens int32 [D], offsets uint32 [n + 1], path probabilities float32 [D].

        Raises:
            DraftError: on an ended handle, a negative token or arrays that do not fit together.
        """
        return self._index.propose_batch(
            handles, new_token_ids, offsets, max_draft_tokens, min_path_probs, capture_sizes, break_even_gain
        )

    @_draft_errors
    def propose_rows(
        self,
        handles: npt.NDArray[np.int64],
        token_ids: npt.NDArray[np.int32],
        rows: npt.NDArray[np.uint32],
        num_tokens: npt.NDArray[np.uint32],
        max_draft_tokens: npt.NDArray[np.uint32],
        min_path_probs: npt.NDArray[np.float32],
        capture_sizes: npt.NDArray[np.uint32] = NO_CAPTURE_SIZES,
        break_even_gain: float = 0.0,
    ) -> list[list[int]]:
        """`propose_batch` that reads each request's text (prompt first) from `token_ids[rows[i], :num_tokens[i]]`.

        Only what a request gained since it was last seen is taken, so calls may have been missed.
        """
        return self.candidates_of_rows(
            handles, token_ids, rows, num_tokens, max_draft_tokens, min_path_probs, capture_sizes, break_even_gain
        )[0]

    @_draft_errors
    def candidates_of_rows(
        self,
        handles: npt.NDArray[np.int64],
        token_ids: npt.NDArray[np.int32],
        rows: npt.NDArray[np.uint32],
        num_tokens: npt.NDArray[np.uint32],
        max_draft_tokens: npt.NDArray[np.uint32],
        min_path_probs: npt.NDArray[np.float32],
        capture_sizes: npt.NDArray[np.uint32] = NO_CAPTURE_SIZES,
        break_even_gain: float = 0.0,
    ) -> tuple[list[list[int]], npt.NDArray[np.float32]]:
        """`propose_rows`, and the path probabilities of all draft tokens, float32 [D], row after row."""
        return self._index.propose_rows(
            handles, token_ids, rows, num_tokens, max_draft_tokens, min_path_probs, capture_sizes, break_even_gain
        )

    @_draft_errors
    def pack(self) -> dict[str, int]:
        """Pack the kept rollouts that ended into segments of the running epoch; describes them as one.

        About 0.2 us a token. Requests may be live; their own tokens wait for the next time.
        """
        return self._index.pack()

    @_draft_errors
    def close_epoch(self, epoch: int, policy_version: int = 0) -> dict[str, int]:
        """`pack` under this epoch's number; the next one is running then."""
        return self._index.close_epoch(epoch, policy_version)

    def begin_epoch(self, epoch: int) -> None:
        """Say which epoch is running; predictions from past ones are weighed by their age."""
        self._index.begin_epoch(epoch)

    def drop_before(self, epoch: int) -> None:
        """Forget the segments of older epochs, also for requests that look into them."""
        self._index.drop_before(epoch)

    def segments(self) -> list[dict[str, Any]]:
        """Return the closed segments, newest first.

        Each with epoch, policy_version, num_{problems,rollouts,tokens,bytes}, checksum (what tells segments apart),
        foreign (made by another engine), shared (nobody else has to be given it).
        """
        return self._index.segments()

    @_draft_errors
    def write_segment(self, number: int, path: str) -> None:
        """Write segment `number` of `segments()` to a file, atomically."""
        self._index.write_segment(number, path)

    @_draft_errors
    def open_segment(self, path: str, foreign: bool = False, shared: bool = True) -> dict[str, Any]:
        """Read a segment's file, and keep it after checking all of it, unless it is held already.

        Raises:
            DraftError: if it is truncated, damaged, of another format or of another tokenizer.
        """
        return self._index.open_segment(path, foreign, shared)

    def take_unshared(self) -> bytes:
        """Return a segment that other engines have not been given yet, b"" if none; it counts as given then."""
        return self._index.take_unshared()

    def share_with_nobody(self) -> None:
        """Count all segments as given: there is nobody to give them to."""
        self._index.share_with_nobody()

    @_draft_errors
    def add_segment(self, segment: bytes) -> dict[str, Any]:
        """Keep what `take_unshared` of another engine returned, as `open_segment` does."""
        return self._index.add_segment(segment)

    def memory_bytes(self) -> dict[str, int]:
        """Return bytes of the `live` tier, the `closed` tier, and the index over all problems (`cross`)."""
        return {
            "live": self._index.live_bytes(),
            "closed": self._index.closed_bytes(),
            "global": self._index.cross_bytes(),
        }

    def live_tokens(self) -> int:
        """Return the tokens in the live tier, prompts included."""
        return self._index.live_tokens()

    @_draft_errors
    def check_integrity(self) -> None:
        """Raise DraftError if any structure contradicts itself; reads everything."""
        self._index.check_integrity()

    @_draft_errors
    def inspect(self, handle: int) -> dict[str, Any]:
        """Return the match of a request: `live_len`, `live_count`, `closed` [(epoch, match length, occurrences)]."""
        return self._index.inspect(handle)

    def take_stats(self) -> dict[str, Any]:
        """Return and reset the counters.

        `request_steps`, `candidates`, `expected_first`, `expected_all`, `by_source`, and what memory had no place for:
        `problems_renewed`, `requests_let_go`, `segments_dropped`, `rollouts_lost`.
        """
        return self._index.take_stats()

    def reliability(self) -> dict[str, float]:
        """Return per source how often its prediction was right, over matches of four tokens and more."""
        return {name: self._index.reliability(i) for i, name in enumerate(SOURCES)}

    def scoring_state(self) -> npt.NDArray[np.float32]:
        """Return what was learned about acceptance, for `load_scoring_state`."""
        return self._index.scoring_state()

    @_draft_errors
    def load_scoring_state(self, state: npt.NDArray[np.float32]) -> None:
        """Restore what `scoring_state` returned."""
        self._index.load_scoring_state(np.ascontiguousarray(state, dtype=np.float32))
