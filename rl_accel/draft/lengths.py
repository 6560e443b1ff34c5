"""Lengths of responses: how much of a live request is left, and whether it will be short, medium or long.

Every problem keeps its last 64 response lengths; a pool keeps the last 4096 of all problems. A live request is a
censored observation, its length exceeds what it has generated, so only longer recorded lengths count: the hazard update
P(L > l + x | L > l). Own lengths are shrunk towards the pool with 4 pseudo-observations at every length, and the pool
leaves 1 / (m + 1) to "longer than all m recorded": by exchangeability that is the chance that a new length exceeds m
others. Lengths there are exponential behind the longest record, so no live request is ever predicted to have nothing
left. The classes follow DAS §4.2.

Left out: correlation between siblings of one step, prompt features, drift with training beyond what the two windows
forget. A response cut at a token limit counts as one of that length; the limits of live requests clip the draws.
Cost: 512 requests x 8 scenarios take about 0.3 ms, one observation 30 us; 330 bytes a problem plus its key.

Shape suffixes: N requests, S scenarios, H = 64 own lengths, M pooled lengths.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np

from rl_accel.errors import DraftError

SHORT, MEDIUM, LONG = 0, 1, 2
HISTORY = 64
"""Lengths kept of a problem."""
POOL = 4096
"""Lengths kept of all problems together."""
POOL_WEIGHT = 4.0
"""Pseudo-observations that the pool counts for beside a problem's own longer lengths."""
TAIL = 0.1
"""Share of the pool, its longest lengths, that the hazard behind the longest record is estimated from."""
MIN_MEAN_TOKENS, MIN_MEAN_SHARE = 8.0, 0.25
"""Least mean remaining length behind all records, in tokens and as a share of the length reached."""
STALE = 64
"""Lengths that `observe` may add before it renews the cut points that class its records; a query renews them always."""
NO_LENGTH = np.iinfo(np.int32).max
"""Pads the sorted rows; no length reaches it."""
FIRST_ROWS = 256
MAX_PROBLEMS, BYTES_PER_PROBLEM = 100_000, 500
"""Problems that are kept, and what one takes at most, its key included."""


class LengthModel:
    """History of response lengths by problem. Not thread-safe; a problem is an int64 key."""

    def __init__(self, max_problems: int = MAX_PROBLEMS) -> None:
        """Keep at most `max_problems` problems; the one observed least recently goes first."""
        if max_problems < 1:
            raise DraftError(f"expected max_problems >= 1, got {max_problems}")
        self.max_problems = max_problems
        self._rows: OrderedDict[int, int] = OrderedDict()
        self._lengths = np.full((1, HISTORY), NO_LENGTH, np.int32)  # sorted; row 0 stays empty: unknown problems
        self._ages = np.zeros((1, HISTORY), np.uint8)  # number of the observation, modulo 256
        self._counts = np.zeros(1, np.int64)  # observations ever, not only those kept
        self._pool = np.zeros(POOL, np.int32)
        self._pool_class = np.zeros(POOL, np.int8)  # class that was expected before the length was known
        self._pool_count, self._stale = 0, 0  # lengths ever, lengths since the last _renew
        self._renew()

    def __len__(self) -> int:
        return len(self._rows)

    def observe(self, problem_key: int, length: int) -> None:
        """Record the length, in tokens, of a response that ended.

        Raises:
            DraftError: if the length is not in 1 .. 2**31 - 2.
        """
        if not 1 <= length < NO_LENGTH:
            raise DraftError(f"expected a response length of 1 to {NO_LENGTH - 1} tokens, got {length}")
        if self._stale >= min(STALE, self._pool_count):
            self._renew()
        row = self._row(int(problem_key))
        slot = self._pool_count % POOL
        self._pool[slot], self._pool_class[slot] = length, self._initial_class(self._lengths[row : row + 1])[0]
        self._pool_count += 1
        self._stale += 1
        self._insert(row, length)

    def remaining(
        self,
        problem_keys: np.ndarray,
        generated: np.ndarray,
        num_scenarios: int,
        rng: np.random.Generator,
        max_remaining: np.ndarray | None = None,
    ) -> np.ndarray:
        """Draw how many tokens each live request still has to generate.

        Args:
            problem_keys: integer [N].
            generated: integer [N], tokens generated so far, the request not finished.
            num_scenarios: S, independent draws for each request.
            rng: source of the draws.
            max_remaining: integer [N], tokens that the request may still generate; None for no limit.

        Returns:
            float64 [S, N], whole numbers, at least 1 except where `max_remaining` is 0.
        """
        generated_N = _checked(problem_keys, generated)
        self._renew_if_stale()
        num_requests, pool_M = len(generated_N), self._sorted
        own_NH = self._lengths[self._rows_of(problem_keys)]
        own_first_N = (own_NH <= generated_N[:, None]).sum(axis=1)
        own_left_N = (own_NH < NO_LENGTH).sum(axis=1) - own_first_N
        pool_first_N = pool_M.searchsorted(generated_N, side="right")
        pool_left_N = len(pool_M) - pool_first_N

        pick_SN = rng.random((num_scenarios, num_requests)) * (own_left_N + POOL_WEIGHT)
        from_own_SN = pick_SN < own_left_N
        own_rank_SN = np.where(from_own_SN, pick_SN, 0.0).astype(np.int64) + own_first_N
        own_rank_SN = np.minimum(own_rank_SN, HISTORY - 1) + np.arange(num_requests) * HISTORY
        pool_rank_SN = ((pick_SN - own_left_N) * ((pool_left_N + 1) / POOL_WEIGHT)).astype(np.int64)
        pool_rank_SN = np.minimum(pool_rank_SN, pool_left_N) + pool_first_N
        pool_length_SN = np.append(pool_M, NO_LENGTH).take(pool_rank_SN, mode="clip")
        left_SN = np.where(from_own_SN, own_NH.take(own_rank_SN), pool_length_SN) - generated_N.astype(np.float64)

        s, n = np.nonzero(~from_own_SN & (pool_rank_SN == len(pool_M)))
        start = np.maximum(generated_N[n], pool_M[-1] if len(pool_M) else 0)
        mean = np.maximum(max(MIN_MEAN_TOKENS, self._tail_mean), MIN_MEAN_SHARE * start)
        left_SN[s, n] = start - generated_N[n] + np.ceil(mean * rng.standard_exponential(len(n))).clip(1.0)
        if max_remaining is not None:
            np.minimum(left_SN, _integers("max_remaining", max_remaining, num_requests, 0), out=left_SN)
        return left_SN

    def length_class(self, problem_keys: np.ndarray, generated: np.ndarray) -> np.ndarray:
        """Class every live request by the length it will probably reach (DAS §4.2).

        The problem's past lengths give an initial class by majority, MEDIUM without any. Among the pooled responses
        that began in that class and grew longer than `generated`, the most frequent class wins, the longer one in a
        tie; where there are none, among all pooled responses, but not below the initial class. Cut points are the 1/3
        and 2/3 quantiles of the pool. The class never falls while a request grows.

        Args:
            problem_keys: integer [N].
            generated: integer [N], tokens generated so far.

        Returns:
            int8 [N] of SHORT, MEDIUM, LONG.
        """
        generated_N = _checked(problem_keys, generated)
        self._renew_if_stale()
        initial_N = self._initial_class(self._lengths[self._rows_of(problem_keys)])
        class_N = np.maximum(initial_N, self._majority_behind(self._sorted, generated_N))
        for initial, lengths in enumerate(self._sorted_by_class):
            longest = lengths[-1] if len(lengths) else 0
            chosen = np.nonzero((initial_N == initial) & (generated_N < longest))[0]
            class_N[chosen] = self._majority_behind(lengths, generated_N[chosen])
        return class_N

    def median(self, problem_key: int) -> float:
        """Return the median length of the problem in tokens, else of the pool; NaN before any observation."""
        row = self._rows.get(int(problem_key), 0)
        own = self._lengths[row, : min(int(self._counts[row]), HISTORY)]
        self._renew_if_stale()
        lengths = own if len(own) else self._sorted
        return float(np.median(lengths)) if len(lengths) else float("nan")

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return all records.

        `problems` int64 [P], the one observed least recently first; `counts` uint8 [P], lengths kept of each, and
        `lengths` int32 [sum of them], `pool` int32 and `pool_class` int8 [M], the oldest first.
        """
        size = min(self._pool_count, POOL)
        oldest_first = (np.arange(size) + self._pool_count - size) % POOL
        rows_P = np.fromiter(self._rows.values(), np.int64, len(self._rows))
        counts_P = np.minimum(self._counts[rows_P], HISTORY)
        used_PH = np.arange(HISTORY) < counts_P[:, None]
        first_P = self._counts[rows_P] - counts_P
        ages_PH = np.where(used_PH, (self._ages[rows_P].astype(np.int64) - first_P[:, None]) % 256, 256)
        by_age_PH = np.take_along_axis(self._lengths[rows_P], ages_PH.argsort(axis=1, kind="stable"), axis=1)
        return {
            "problems": np.fromiter(self._rows, np.int64, len(self._rows)),
            "counts": counts_P.astype(np.uint8),
            "lengths": by_age_PH[used_PH],
            "pool": self._pool[oldest_first],
            "pool_class": self._pool_class[oldest_first],
        }

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over saved records; of more problems than this model may keep, the latest.

        Raises:
            DraftError: if the content is not a state of this class; the present records are kept then.
        """
        loaded = LengthModel(self.max_problems)
        try:
            if set(state) != {"problems", "counts", "lengths", "pool", "pool_class"}:
                raise ValueError(f"keys {sorted(state)}")
            loaded._load_problems(state["problems"], state["counts"], state["lengths"])
            size = len(state["pool"])
            if size > POOL:
                raise ValueError(f"a pool of {size} lengths")
            loaded._pool[:size] = _integers("pool", state["pool"], size, 1)
            loaded._pool_class[:size] = _integers("pool_class", state["pool_class"], size, SHORT, LONG)
            loaded._pool_count = size
            loaded._renew()
            loaded.check_integrity()
        except (TypeError, ValueError, OverflowError, AttributeError, DraftError) as err:
            raise DraftError(f"not a saved state of LengthModel ({err}); delete it to learn lengths anew") from err
        self.__dict__.update(loaded.__dict__)

    def _load_problems(self, problems: Any, counts: Any, lengths: Any) -> None:
        keys_P = _integers("problems", problems, len(problems), np.iinfo(np.int64).min, np.iinfo(np.int64).max)
        counts_P = _integers("counts", counts, len(keys_P), 1, HISTORY).astype(np.int64)
        lengths = _integers("lengths", lengths, int(counts_P.sum()), 1)
        skipped = max(len(keys_P) - self.max_problems, 0)
        lengths = lengths[counts_P[:skipped].sum() :]
        keys_P, counts_P = keys_P[skipped:], counts_P[skipped:]
        used_PH = np.arange(HISTORY) < counts_P[:, None]
        by_age_PH = np.full(used_PH.shape, NO_LENGTH, np.int32)
        by_age_PH[used_PH] = lengths
        order_PH = by_age_PH.argsort(axis=1, kind="stable")  # what is not used stays behind
        sorted_PH = np.take_along_axis(by_age_PH, order_PH, axis=1)
        self._lengths = np.pad(sorted_PH, ((1, 0), (0, 0)), constant_values=NO_LENGTH)
        self._ages = np.pad(order_PH.astype(np.uint8), ((1, 0), (0, 0)))
        self._counts = np.pad(counts_P, (1, 0))
        self._rows = OrderedDict(zip(keys_P.tolist(), range(1, len(keys_P) + 1), strict=True))
        if len(self._rows) != len(keys_P):
            raise ValueError("a problem is listed twice")

    def check_integrity(self) -> None:
        """Raise DraftError if the rows, their order or the pool contradict each other."""
        rows = np.fromiter(self._rows.values(), np.int64, len(self._rows))
        kept = np.minimum(self._counts, HISTORY)
        used_H = np.arange(HISTORY) < kept[:, None]
        if len(rows) > self.max_problems or len(np.unique(rows)) != len(rows) or (len(rows) and rows.min() < 1):
            raise DraftError("problems share rows, or are more than allowed")
        if kept.sum() != kept[rows].sum() or ((self._lengths < NO_LENGTH) != used_H).any():
            raise DraftError("number of lengths kept for a problem is wrong")
        if (np.diff(self._lengths, axis=1) < 0).any() or self._lengths.min() < 1:
            raise DraftError("lengths of a problem are not sorted or not positive")
        size = min(self._pool_count, POOL)
        if (self._pool[:size] < 1).any() or not np.isin(self._pool_class[:size], (SHORT, MEDIUM, LONG)).all():
            raise DraftError("pooled lengths or their classes are out of range")

    def memory_bytes(self) -> int:
        """Return the bytes held, with 64 for the key and the row number of a problem."""
        arrays = (self._lengths, self._ages, self._counts, self._pool, self._pool_class, self._sorted)
        held = sum(array.nbytes for array in (*arrays, *self._sorted_by_class))
        return held + sys.getsizeof(self._rows) + 64 * len(self._rows)

    def _row(self, key: int) -> int:
        """Return the row of a problem, now the latest one; a new problem may take the row of the oldest."""
        row = self._rows.get(key)
        if row is not None:
            self._rows.move_to_end(key)
            return row
        if len(self._rows) >= self.max_problems:
            row = self._rows.popitem(last=False)[1]
            self._lengths[row], self._counts[row] = NO_LENGTH, 0
        else:
            row = len(self._rows) + 1
            if row >= len(self._counts):
                new_rows = min(max(FIRST_ROWS, row), self.max_problems + 1 - row)
                self._lengths = np.pad(self._lengths, ((0, new_rows), (0, 0)), constant_values=NO_LENGTH)
                self._ages = np.pad(self._ages, ((0, new_rows), (0, 0)))
                self._counts = np.pad(self._counts, (0, new_rows))
        self._rows[key] = row
        return row

    def _insert(self, row: int, length: int) -> None:
        """Put a length into its sorted row, in the place of the oldest one if the row is full."""
        lengths_H, ages_H, count = self._lengths[row], self._ages[row], int(self._counts[row])
        oldest = (count - HISTORY) % 256
        slot = count if count < HISTORY else int((ages_H == oldest).argmax())
        lengths_H[slot], ages_H[slot] = length, count % 256
        order_H = lengths_H.argsort(kind="stable")
        lengths_H[:], ages_H[:] = lengths_H[order_H], ages_H[order_H]
        self._counts[row] = count + 1

    def _rows_of(self, problem_keys: np.ndarray) -> list[int]:
        get = self._rows.get
        return [get(key, 0) for key in problem_keys.tolist()]

    def _renew_if_stale(self) -> None:
        if self._stale:
            self._renew()

    def _renew(self) -> None:
        """Sort the pool, and derive the cut points and the mean length behind its tail."""
        size = min(self._pool_count, POOL)
        packed = np.sort(self._pool[:size].astype(np.int64) * 4 + self._pool_class[:size])  # faster than argsort
        self._sorted, classes = (packed >> 2).astype(np.int32), packed & 3
        self._sorted_by_class = [self._sorted[classes == c] for c in (SHORT, MEDIUM, LONG)]
        self._cuts = (int(self._sorted[size // 3]), int(self._sorted[2 * size // 3])) if size else (NO_LENGTH,) * 2
        tail = self._sorted[int(size * (1.0 - TAIL)) :]
        self._tail_mean = float(tail.mean() - tail[0]) if size else 0.0
        self._stale = 0

    def _majority_behind(self, sorted_lengths: np.ndarray, generated_N: np.ndarray) -> np.ndarray:
        """Return the majority class of the lengths above `generated`; where there are none, the least possible one."""
        behind_N = np.searchsorted(sorted_lengths, generated_N, side="right")
        ends = [0, *np.searchsorted(sorted_lengths, self._cuts, side="left"), len(sorted_lengths)]
        counts = [(ends[c + 1] - np.maximum(behind_N, ends[c])).clip(0) for c in (SHORT, MEDIUM, LONG)]
        reached_N = (generated_N + 1 >= self._cuts[0]).astype(np.int8) + (generated_N + 1 >= self._cuts[1])
        return np.where(behind_N < len(sorted_lengths), _majority(*counts), reached_N)

    def _initial_class(self, own_NH: np.ndarray) -> np.ndarray:
        not_short_N, not_medium_N = ((own_NH >= cut).sum(axis=1) for cut in self._cuts)
        padding_N = (own_NH == NO_LENGTH).sum(axis=1)
        class_N = _majority(HISTORY - not_short_N, not_short_N - not_medium_N, not_medium_N - padding_N)
        class_N[padding_N == HISTORY] = MEDIUM
        return class_N


def _majority(num_short_N: np.ndarray, num_medium_N: np.ndarray, num_long_N: np.ndarray) -> np.ndarray:
    """Return the most frequent class, int8 [N], the longer one in a tie."""
    most_N = np.maximum(num_short_N, num_medium_N)
    return np.where(num_long_N >= most_N, np.int8(LONG), (num_medium_N == most_N).astype(np.int8))


def _checked(problem_keys: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """Return `generated` as int32 [N], after a check of both arguments."""
    _integers("problem_keys", problem_keys, len(generated))
    return _integers("generated", generated, len(generated), 0).astype(np.int32)


def _integers(name: str, values: Any, size: int, least: int | None = None, most: int = NO_LENGTH - 1) -> np.ndarray:
    array = np.asarray(values)
    if array.shape != (size,) or (size and array.dtype.kind not in "iu"):
        raise DraftError(f"{name}: expected {size} integers, got {array.dtype} {list(array.shape)}")
    if size and least is not None and not (least <= array.min() and array.max() <= most):
        raise DraftError(f"{name}: expected values of {least} to {most}, got {array.min()} to {array.max()}")
    return array
