"""Whether what is served does what it promised: accepted tokens of drafts against those that were expected.

A head is too sure of itself: a young one everywhere, a trained one beyond the depth that it was trained for (a token
that it promised with 0.27 was accepted in 0.08 of the cases), and most of all where it is asked because it promises
more than history. So each depth has a temperature, which follows what was accepted there: drafts are as long as is
worth it. The drafted tokens do not depend on it.

Shape suffixes: R drafts, K tokens of the longest.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MIN_DRAFTS = 256
"""Before anything is said of a version."""
WORSE, FEWER = 0.5, 0.7
"""A version is taken back that has less than these shares of the calibration and of the accepted tokens a draft of the
one before: a head that has learned may promise more than it keeps, and keep more than before."""
RATE, HALF_RATE_TOKENS = 0.5, 32.0
"""How fast a temperature moves, by the relative error of a step; half as fast where the step says so little of it."""
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.7, 8.0
RENEWED = 0.1
"""Share of the way back to 1 that temperatures go when another version is served, which may know more."""
SILENT = 0.02
"""Below so many accepted tokens a drafted one the head is silent."""


class ServedWatch:
    """Counts since the version was installed.

    Args:
        max_draft: longest draft.
    """

    def __init__(self, max_draft: int) -> None:
        self._num_drafts = self._num_drafted = self._num_accepted = 0
        self._expected = 0.0
        self._before: tuple[float, float] | None = None  # calibration, accepted tokens a draft
        self.silent = False
        self.temperatures_K = np.ones(max_draft)
        """Of the probabilities that the head gives the token at each depth."""

    def begin(self) -> None:
        """Another version is served from now on."""
        if self._num_drafts >= MIN_DRAFTS and not self.silent:
            self._before = self.calibration, self._num_accepted / self._num_drafts
        self._num_drafts = self._num_drafted = self._num_accepted = 0
        self._expected, self.silent = 0.0, False
        self.temperatures_K += RENEWED * (1.0 - self.temperatures_K)

    def observe(
        self,
        paths_RK: npt.NDArray[np.float32],
        lengths_R: npt.NDArray[np.int64],
        num_accepted_R: npt.NDArray[np.int64],
    ) -> str:
        """Count drafts that were verified; returns `worse` or `silent` once when there is reason to, else "".

        Args:
            paths_RK: promised probabilities that the tokens up to each one are accepted.
            lengths_R: tokens of each draft, at most K.
            num_accepted_R: those that were accepted.
        """
        depth_K = np.arange(paths_RK.shape[1])
        inside_RK = depth_K < lengths_R[:, None]
        self._num_drafts += len(lengths_R)
        self._num_drafted += int(lengths_R.sum())
        self._expected += float((paths_RK * inside_RK).sum())
        self._num_accepted += int(num_accepted_R.sum())
        self._calibrate(paths_RK, inside_RK & (depth_K <= num_accepted_R[:, None]), depth_K < num_accepted_R[:, None])
        if self._num_drafts < MIN_DRAFTS or self.silent:
            return ""
        if self._before is not None and self._is_worse(*self._before):
            self._before = None
            return "worse"
        if self._num_accepted < SILENT * self._num_drafted:
            self.silent = True
            return "silent"
        if self._num_drafts > 16 * MIN_DRAFTS:  # forget slowly, so that a policy that moves away is noticed
            for name in ("_num_drafts", "_num_drafted", "_num_accepted"):
                setattr(self, name, getattr(self, name) // 2)
            self._expected /= 2.0
        return ""

    def _is_worse(self, calibration: float, accepted: float) -> bool:
        return self.calibration < WORSE * calibration and self._num_accepted < FEWER * accepted * self._num_drafts

    def _calibrate(
        self,
        paths_RK: npt.NDArray[np.float32],
        tried_RK: npt.NDArray[np.bool_],
        accepted_RK: npt.NDArray[np.bool_],
    ) -> None:
        """Move each depth's temperature by its tokens whose predecessors were accepted."""
        before_RK = np.concatenate([np.ones_like(paths_RK[:, :1]), paths_RK[:, :-1]], 1)
        promised_K = np.where(tried_RK, paths_RK / np.maximum(before_RK, 1e-9), 0.0).sum(0)
        tried_K, kept_K = tried_RK.sum(0), (accepted_RK & tried_RK).sum(0)
        error_K = (promised_K - kept_K) / np.maximum(promised_K + tried_K, 1e-9)
        rate_K = RATE * tried_K / (tried_K + HALF_RATE_TOKENS)
        found = self.temperatures_K[: len(tried_K)]
        found *= 1.0 + rate_K * error_K
        np.clip(found, MIN_TEMPERATURE, MAX_TEMPERATURE, out=found)

    @property
    def calibration(self) -> float:
        return self._num_accepted / max(self._expected, 1e-9)
