"""Time of a decoding step, learned while it runs: base_s + speculation_s [d > 0] + per_request_s * n + per_draft_s * d.

n counts the live requests of the step and d the draft tokens verified in it. Weighted least squares that forgets (about
500 steps), in information form: decayed normal equations and one 4x4 solve an observation, so the prior never fades
and inputs that do not vary cannot wind the estimate up. Rows are weighted by 1 / predicted time. Residuals are clipped
as Huber does; residuals that stay on one side mean a change of regime, and earlier steps then lose most of their
weight.

Source: DAS §4.2, whose model is c_base + c_tok * tokens; differs: a request and a draft token each have a cost, since
a draft token shares the KV-cache read, the scheduling and the bookkeeping of its request; verifying drafts at all has
one too, since the engine then prepares, masks and samples by its speculative path (1.5 ms of 10 with the tiny policy
on CPU). Where the steps seen cannot tell costs apart, the priors per_draft_s == per_request_s and speculation_s == 0
give the paper's model back.

Left out: prefill tokens and context length; steps with prefills should not be observed.
Cost: about 15 us an observation, O(1) memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_accel.errors import DraftError

KEEP = 1.0 - 1.0 / 500.0
"""Weight that a step loses with each later step."""
DRIFT_RATE, DRIFT_LIMIT = 1.0 / 25.0, 0.55
"""Mean over 25 passes of the signed residual in mean absolute residuals, clipped to 1: symmetric noise passes 0.55 at
5 sigma, a doubling of all times after about 20 steps."""
STEPS_KEPT = 12.0
"""Steps that all earlier ones count for once the limit is passed."""
ERROR_RATE, ERROR_CLIP, HUBER_CLIP = 1.0 / 50.0, 4.0, 2.5
"""Running mean absolute relative residual over 50 steps; clips are multiples of it."""
MIN_ERROR = 0.005
PRIOR_STEPS = 0.1
"""Strength of the priors, in steps; small, because only directions that the steps leave open need one."""
PRIOR_TOKENS_PER_BASE = 320.0
"""Tokens that take as long as an empty step: DAS Fig 8, 7B on H100. Matters only while all steps are of one size."""
FIT_EVERY = 4
"""Steps between two solves, after the first `MIN_STEPS`."""
MIN_STEPS, MIN_DRAFT_STEPS, MIN_SPREAD = 64, 16.0, 0.01
"""For `ready`: steps, steps with drafts not yet forgotten, squared relative spread of the step sizes."""


class StepCostModel:
    """On-line fit of the seconds of a step. Not thread-safe."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._weight, self._draft_weight = 0.0, 0.0
        self._error, self._drift = 1.0, 0.0
        # Decayed sums over rows w * (1, [d > 0], n, d) and targets w * seconds, with w = 1 / predicted.
        self._gram, self._moments = np.zeros((4, 4)), np.zeros(4)
        self._coefficients = (0.0, 0.0, 0.0, 0.0)

    @property
    def base_s(self) -> float:
        """Seconds of a step without requests; never negative."""
        return self._coefficients[0]

    @property
    def speculation_s(self) -> float:
        """Seconds that verifying drafts adds, however few they are; never negative."""
        return self._coefficients[1]

    @property
    def per_request_s(self) -> float:
        """Seconds that a live request adds; never negative."""
        return self._coefficients[2]

    @property
    def per_draft_s(self) -> float:
        """Seconds that a draft token adds; never negative, zero if drafts were not seen to cost time."""
        return self._coefficients[3]

    @property
    def relative_error(self) -> float:
        """Running mean of |seconds - predicted| / predicted, outliers clipped; 1.0 before the first step."""
        return self._error

    @property
    def knows_base(self) -> bool:
        """Whether steps enough were seen, of different sizes."""
        weight, mean = self._gram[0, 0], self._gram[0, 2:].sum()
        square = self._gram[2:, 2:].sum()
        varied = bool(weight * square - mean * mean > MIN_SPREAD * weight * square)
        return self._num_steps >= MIN_STEPS and varied

    @property
    def ready(self) -> bool:
        """Whether that is so, with drafts in some of the recent steps."""
        return self._draft_weight >= MIN_DRAFT_STEPS and self.knows_base

    def predict(self, num_requests: float, num_draft_tokens: float) -> float:
        """Return the expected seconds of a step; 0.0 before the first observation."""
        base_s, speculation_s, per_request_s, per_draft_s = self._coefficients
        step_s = base_s + speculation_s if num_draft_tokens else base_s
        return step_s + per_request_s * num_requests + per_draft_s * num_draft_tokens

    def observe(self, seconds: float, num_requests: int, num_draft_tokens: int) -> None:
        """Learn from one step.

        Args:
            seconds: wall time of the step, above zero.
            num_requests: live requests of the step, at least one.
            num_draft_tokens: draft tokens of all requests that the step verified.

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
        rate = max(ERROR_RATE, 1.0 / (self._num_steps + 2.0))
        self._error = max(MIN_ERROR, error + rate * (min(abs(residual), ERROR_CLIP * error) - error))

        keep = KEEP
        if abs(self._drift) > DRIFT_LIMIT:
            keep, self._drift = min(KEEP, STEPS_KEPT / self._weight), 0.0
        w = 1.0 / predicted
        row = np.array((w, w * (num_draft_tokens > 0), w * num_requests, w * num_draft_tokens))
        self._gram *= keep
        self._gram += np.multiply.outer(row, row)
        self._moments *= keep
        self._moments += row * y
        self._num_steps += 1
        self._weight = keep * self._weight + 1.0
        self._draft_weight = KEEP * self._draft_weight + (num_draft_tokens > 0)
        if self._num_steps <= MIN_STEPS or self._num_steps % FIT_EVERY == 0 or keep < KEEP:
            self._fit()

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs, in plain numbers."""
        return {
            "num_steps": self._num_steps,
            "weight": self._weight,
            "draft_weight": self._draft_weight,
            "error": self._error,
            "drift": self._drift,
            "gram": self._gram.tolist(),
            "moments": self._moments.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state; predictions are then equal to those of the saved fit.

        Raises:
            DraftError: if the content is not a state of this class; the present state is kept then.
        """
        loaded = StepCostModel()
        try:
            if set(state) != set(loaded.state_dict()):
                raise ValueError(f"keys {sorted(state)}")
            loaded._num_steps = int(
                state["num_steps"] if "num_steps" in state else state["num_passes"]
            )  # its name until 0.1
            loaded._weight, loaded._draft_weight = float(state["weight"]), float(state["draft_weight"])
            loaded._error, loaded._drift = float(state["error"]), float(state["drift"])
            loaded._gram = np.array(state["gram"], np.float64)
            loaded._moments = np.array(state["moments"], np.float64)
            loaded._check()
            if loaded._num_steps:
                loaded._fit()
        except (TypeError, ValueError, ArithmeticError) as err:
            raise DraftError(
                f"not a saved state of StepCostModel ({err}); delete it to learn the step cost anew"
            ) from err
        self.__dict__.update(loaded.__dict__)

    def _check(self) -> None:
        gram, moments = self._gram, self._moments
        if gram.shape != (4, 4) or moments.shape != (4,):
            raise ValueError("sums of another shape")
        scalars = (self._weight, self._draft_weight, self._drift, self._error)
        finite = np.isfinite(gram).all() and np.isfinite(moments).all() and all(map(math.isfinite, scalars))
        seen = self._num_steps >= 1 and self._weight >= 1.0 and gram[0, 0] > 0.0 and gram[2, 2] > 0.0
        unseen = self._num_steps == 0 and self._weight == 0.0 and not gram.any() and not moments.any()
        if not (finite and (seen or unseen) and (gram >= 0.0).all() and (moments >= 0.0).all()):
            raise ValueError("sums that no steps can have")
        diagonal = gram.diagonal()
        if not (gram == gram.T).all() or (gram**2 > 1.001 * np.multiply.outer(diagonal, diagonal)).any():
            raise ValueError("sums that no steps can have")
        if not (0.0 <= self._draft_weight <= self._num_steps and self._error >= MIN_ERROR and abs(self._drift) <= 1.0):
            raise ValueError("weights or errors out of range")

    def _fit(self) -> None:
        """Minimize the decayed squares plus the squares of the priors, over coefficients that are not negative."""
        gram, moments = self._gram.copy(), self._moments.copy()
        priors = self._priors(PRIOR_STEPS / self._weight)
        gram += priors.T @ priors
        x = np.linalg.solve(gram, moments)
        while x.min() < 0.0:
            worst = x.argmin()
            gram[worst] = gram[:, worst] = moments[worst] = 0.0
            gram[worst, worst] = 1.0
            x = np.linalg.solve(gram, moments)
        base_s, speculation_s, per_request_s, per_draft_s = x.tolist()
        self._coefficients = (base_s, speculation_s, per_request_s, per_draft_s)

    def _priors(self, strength: float) -> npt.NDArray[np.float64]:
        """Rows that say per_draft_s == per_request_s, per_request_s == base_s / 320, speculation_s == 0."""
        once, _, requests, drafts = (strength * self._gram.diagonal()).tolist()
        same, size = math.sqrt(requests + drafts), math.sqrt(requests)
        return np.array(
            (
                (0.0, 0.0, same, -same),
                (-size / PRIOR_TOKENS_PER_BASE, 0.0, size, 0.0),
                (0.0, math.sqrt(once), 0.0, 0.0),
            )
        )
