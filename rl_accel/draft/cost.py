"""Time of one decoding pass, learned while it runs: base_s + per_request_s * n + per_draft_s * d.

n counts the live requests of the pass and d the draft tokens verified in it. Weighted least squares that forgets (about
500 passes), in information form: nine decayed sums and one 3x3 solve an observation, so the prior never fades and
inputs that do not vary cannot wind the estimate up. Rows are weighted by 1 / predicted time. Residuals are clipped as
Huber does; residuals that stay on one side mean a change of regime, and earlier passes then lose most of their weight.

Source: DAS §4.2, whose model is c_base + c_tok * tokens; differs: a request and a draft token each have a price, since
a draft token shares the KV-cache read, the scheduling and the bookkeeping of its request. Where the passes seen cannot
tell the two apart, the prior per_draft_s == per_request_s gives the paper's model back.

Left out: prefill tokens and context length; passes with prefills should not be observed.
Cost: about 4 us an observation, O(1) memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rl_accel.errors import DraftError

KEEP = 1.0 - 1.0 / 500.0
"""Weight that a pass loses with each later pass."""
DRIFT_RATE, DRIFT_LIMIT = 1.0 / 25.0, 0.55
"""Mean over 25 passes of the signed residual in mean absolute residuals, clipped to 1: symmetric noise passes 0.55 at
5 sigma, a doubling of all times after about 20 passes."""
PASSES_KEPT = 12.0
"""Passes that all earlier ones count for once the limit is passed."""
ERROR_RATE, ERROR_CLIP, HUBER_CLIP = 1.0 / 50.0, 4.0, 2.5
"""Running mean absolute relative residual over 50 passes; clips are multiples of it."""
MIN_ERROR = 0.005
PRIOR_PASSES = 0.1
"""Strength of the priors, in passes; small, because only directions that the passes leave open need one."""
PRIOR_TOKENS_PER_BASE = 320.0
"""Tokens that take as long as an empty pass: DAS Fig 8, 7B on H100. Matters only while all passes are of one size."""
MIN_PASSES, MIN_DRAFT_PASSES, MIN_SPREAD = 64, 16.0, 0.01
"""For `ready`: passes, passes with drafts not yet forgotten, squared relative spread of the pass sizes."""


class PassCost:
    """On-line fit of the seconds of a pass. Not thread-safe."""

    def __init__(self) -> None:
        self._num_passes = 0
        self._weight, self._draft_weight = 0.0, 0.0
        self._error, self._drift = 1.0, 0.0
        # Decayed sums of ww, wn, wd, nn, nd, dd, wy, ny, dy with w = 1 / predicted; n, d and y = seconds times w.
        self._sums: tuple[float, ...] = (0.0,) * 9
        self._coefficients = (0.0, 0.0, 0.0)

    @property
    def base_s(self) -> float:
        """Seconds of a pass without requests; never negative."""
        return self._coefficients[0]

    @property
    def per_request_s(self) -> float:
        """Seconds that a live request adds; never negative."""
        return self._coefficients[1]

    @property
    def per_draft_s(self) -> float:
        """Seconds that a draft token adds; never negative, zero if drafts were not seen to cost time."""
        return self._coefficients[2]

    @property
    def relative_error(self) -> float:
        """Running mean of |seconds - predicted| / predicted, outliers clipped; 1.0 before the first pass."""
        return self._error

    @property
    def ready(self) -> bool:
        """Whether passes enough, of different sizes, were seen, and passes with drafts among the recent ones."""
        ww, wn, wd, nn, nd, dd = self._sums[:6]
        size_square, size_mean = nn + 2.0 * nd + dd, wn + wd
        varied = ww * size_square - size_mean * size_mean > MIN_SPREAD * ww * size_square
        return self._num_passes >= MIN_PASSES and self._draft_weight >= MIN_DRAFT_PASSES and varied

    def predict(self, num_requests: float, num_draft_tokens: float) -> float:
        """Return the expected seconds of a pass; 0.0 before the first observation."""
        base_s, per_request_s, per_draft_s = self._coefficients
        return base_s + per_request_s * num_requests + per_draft_s * num_draft_tokens

    def observe(self, seconds: float, num_requests: int, num_draft_tokens: int) -> None:
        """Learn from one pass.

        Args:
            seconds: wall time of the pass, above zero.
            num_requests: live requests of the pass, at least one.
            num_draft_tokens: draft tokens of all requests that the pass verified.

        Raises:
            DraftError: if a value is out of range; nothing is learned then.
        """
        if not (0.0 < seconds < math.inf and 1 <= num_requests < math.inf and 0 <= num_draft_tokens < math.inf):
            raise DraftError(
                f"expected seconds > 0, num_requests >= 1, num_draft_tokens >= 0; "
                f"got {seconds}, {num_requests}, {num_draft_tokens}"
            )
        predicted = self.predict(num_requests, num_draft_tokens) or seconds
        residual, error = seconds / predicted - 1.0, self._error
        limit = HUBER_CLIP * error
        y = 1.0 + min(max(residual, -limit), limit)
        self._drift += DRIFT_RATE * (min(max(residual / error, -1.0), 1.0) - self._drift)
        rate = max(ERROR_RATE, 1.0 / (self._num_passes + 2.0))
        self._error = max(MIN_ERROR, error + rate * (min(abs(residual), ERROR_CLIP * error) - error))

        keep = KEEP
        if abs(self._drift) > DRIFT_LIMIT:
            keep, self._drift = min(KEEP, PASSES_KEPT / self._weight), 0.0
        w = 1.0 / predicted
        n, d = w * num_requests, w * num_draft_tokens
        ww, wn, wd, nn, nd, dd, wy, ny, dy = self._sums
        self._sums = (
            keep * ww + w * w,
            keep * wn + w * n,
            keep * wd + w * d,
            keep * nn + n * n,
            keep * nd + n * d,
            keep * dd + d * d,
            keep * wy + w * y,
            keep * ny + n * y,
            keep * dy + d * y,
        )
        self._num_passes += 1
        self._weight = keep * self._weight + 1.0
        self._draft_weight = KEEP * self._draft_weight + (num_draft_tokens > 0)
        self._fit()

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs, in plain numbers."""
        return {
            "num_passes": self._num_passes,
            "weight": self._weight,
            "draft_weight": self._draft_weight,
            "error": self._error,
            "drift": self._drift,
            "sums": list(self._sums),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state; predictions are then equal to those of the saved fit.

        Raises:
            DraftError: if the content is not a state of this class; the present state is kept then.
        """
        loaded = PassCost()
        try:
            if set(state) != set(loaded.state_dict()):
                raise ValueError(f"keys {sorted(state)}")
            loaded._num_passes = int(state["num_passes"])
            loaded._weight, loaded._draft_weight = float(state["weight"]), float(state["draft_weight"])
            loaded._error, loaded._drift = float(state["error"]), float(state["drift"])
            loaded._sums = tuple(float(x) for x in state["sums"])
            loaded._check()
            if loaded._num_passes:
                loaded._fit()
        except (TypeError, ValueError, ArithmeticError) as err:
            raise DraftError(f"not a saved state of PassCost ({err}); delete it to learn the pass cost anew") from err
        self.__dict__.update(loaded.__dict__)

    def _check(self) -> None:
        ww, wn, wd, nn, nd, dd, *moments = self._sums
        finite = all(map(math.isfinite, (*self._sums, self._weight, self._draft_weight, self._drift, self._error)))
        seen = self._num_passes >= 1 and self._weight >= 1.0 and ww > 0.0 and nn > 0.0
        unseen = self._num_passes == 0 and self._weight == 0.0 and not any(self._sums)
        cauchy = wn * wn <= 1.001 * ww * nn and wd * wd <= 1.001 * ww * dd and nd * nd <= 1.001 * nn * dd
        if not (finite and len(moments) == 3 and (seen or unseen) and cauchy and dd >= 0.0 and min(moments) >= 0.0):
            raise ValueError("sums that no passes can have")
        if not (0.0 <= self._draft_weight <= self._num_passes and self._error >= MIN_ERROR and abs(self._drift) <= 1.0):
            raise ValueError("weights or errors out of range")

    def _fit(self) -> None:
        """Minimise the decayed squares plus the squares of both priors, over coefficients that are not negative."""
        ww, wn, wd, nn, nd, dd, wy, ny, dy = self._sums
        same = PRIOR_PASSES * (nn + dd) / self._weight  # times (per_request_s - per_draft_s)^2
        size = PRIOR_PASSES * nn / self._weight  # times (per_request_s - base_s / PRIOR_TOKENS_PER_BASE)^2
        ratio = 1.0 / PRIOR_TOKENS_PER_BASE
        ww += ratio * ratio * size
        wn -= ratio * size
        nn += same + size
        nd -= same
        dd += same
        x = _solve(ww, wn, wd, nn, nd, dd, wy, ny, dy)
        while min(x) < 0.0:
            worst = x.index(min(x))
            if worst == 0:
                ww, wn, wd, wy = 1.0, 0.0, 0.0, 0.0
            elif worst == 1:
                nn, wn, nd, ny = 1.0, 0.0, 0.0, 0.0
            else:
                dd, wd, nd, dy = 1.0, 0.0, 0.0, 0.0
            x = _solve(ww, wn, wd, nn, nd, dd, wy, ny, dy)
        self._coefficients = x


def _solve(
    a: float, b: float, c: float, d: float, e: float, f: float, x: float, y: float, z: float
) -> tuple[float, float, float]:
    """Solve [[a, b, c], [b, d, e], [c, e, f]] @ result = [x, y, z], positive definite, by LDL^T."""
    l1, l2 = b / a, c / a
    d -= l1 * b
    e -= l1 * c
    l3 = e / d
    y -= l1 * x
    z = (z - l2 * x - l3 * y) / (f - l2 * c - l3 * e)
    y = y / d - l3 * z
    return x / a - l1 * y - l2 * z, y, z
