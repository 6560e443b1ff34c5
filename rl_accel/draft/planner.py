"""How long each request's next draft may be: the length-aware budget, the paper's classes, or a fixed length.

Step times are fitted (`cost.py`), remaining lengths predicted (`lengths.py`), and the makespan optimum (`budget.py`)
gives the value of a token less for each request. A candidate token is admitted while its acceptance probability is
worth its cost (`min_path_probs`), and all together have to be worth the overhead of speculating (`break_even_gain`).
Where they are not, nothing is drafted: speculation turns itself off. The index goes on comparing its predictions with
what is sampled, so it notices when they would be good enough. Two costs have to be probed: that of a draft token every
`PROBE_EVERY` steps without drafts, and the overhead, which only a step without drafts shows, every `UNDRAFTED_EVERY`.

Source: DAS §4.2; differs: see `budget.py`; half of the value of a step is shared equally, because a rollout that ends
early also frees its slot, and a forecast can be wrong.
Cost: about 20 us a step, and a plan of 0.5 to 1 ms every `PLAN_EVERY` steps, or as often as `MAX_SHARE` allows.

Shape suffixes: N requests, S scenarios.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from rl_accel.draft import budget
from rl_accel.draft.cost import StepCostModel
from rl_accel.draft.lengths import MAX_PROBLEMS, LengthModel
from rl_accel.errors import DraftError

PLAN_EVERY, MAX_SHARE = 16, 0.02
"""Steps between two forecasts, each used until the next. Forecasts take no larger share of the time than this."""
PROBE_EVERY, PROBE_STEPS = 128, 4
"""Steps without any draft after which so many draft what is likely, to see what drafts cost now."""
UNDRAFTED_EVERY = 64
"""Steps with drafts after which one has none."""
CHEAPER = -0.1
"""A probe goes on while its last steps took less than predicted by this share: a fit that is sure of high costs needs
more steps to believe in low ones than a probe has."""
SCENARIO_CELLS = 4096
"""Requests times scenarios of a forecast: few requests get many scenarios, as their values scatter more."""
EQUAL_SHARE = 0.5
FIRST_MIN_PATH_PROB = 0.4
"""Until the cost of a draft token is known, and when it is probed."""
RATE = 1.0 / 64.0


class Planner:
    """Limits of the next drafts. Not thread-safe."""

    def __init__(self, policy: str, max_draft: int, seed: int = 0, max_problems: int = MAX_PROBLEMS):
        self.policy, self.max_draft = policy, max_draft
        self.cost = StepCostModel()
        self.lengths = LengthModel(max_problems)
        self.last_plan_s = 0.0
        self._rng = np.random.default_rng(seed)
        self._accepted, self._first = 0.5, 0.3  # per request and step, if everything were drafted; of first tokens
        self._steps_without_draft, self._steps_to_undrafted = 0, UNDRAFTED_EVERY
        self._break_even_gain = 0.0
        self._probing, self._surprise, self._steps_of_probe = False, 0.0, 0
        self.cost_is_known = False
        """Whether the cost was ready once; from then on probes keep it fresh."""
        self.timed = False
        """Whether step times are reported; without them no cost is known."""

    @property
    def probing(self) -> bool:
        """Whether drafts should be made to learn what they cost."""
        return not self.cost_is_known or self._steps_without_draft >= PROBE_EVERY

    @property
    def knows_costs(self) -> bool:
        """Whether `min_path_probs` of the last plan say what a draft token costs; not before that is known, nor in a
        probe."""
        return self.cost_is_known and not self._probing

    @property
    def probed(self) -> bool:
        """Whether a probe has had its steps, so that a plan is due."""
        return self._steps_of_probe >= PROBE_STEPS

    def observe_step(self, seconds: float, num_requests: int, num_draft_tokens: int) -> None:
        """Learn from one step without prefills: its wall time, live requests and verified draft tokens."""
        predicted = self.cost.predict(num_requests, num_draft_tokens)
        self.cost.observe(seconds, num_requests, num_draft_tokens)
        self.timed = True
        self.cost_is_known = self.cost_is_known or self.cost.ready
        if num_draft_tokens:
            self._steps_without_draft = 0
            if self._probing and predicted:
                self._steps_of_probe += 1
                self._surprise += (seconds / predicted - 1.0 - self._surprise) / self._steps_of_probe
        else:
            self._steps_without_draft += 1
            self._steps_to_undrafted = UNDRAFTED_EVERY

    def observe_candidates(self, request_steps: int, expected_first: float, expected_all: float) -> None:
        """Learn how much could be accepted: sums of acceptance probabilities over so many request-steps."""
        if request_steps > 0:
            rate = 1.0 - (1.0 - RATE) ** max(1.0, request_steps / 64.0)
            self._accepted += rate * (expected_all / request_steps - self._accepted)
            self._first += rate * (expected_first / request_steps - self._first)

    def min_steps(self, num_requests: int) -> int:
        """Return how many steps should follow a plan before the next one, by what the last one took."""
        step_s = self.cost.predict(num_requests, 0)
        return math.ceil(self.last_plan_s / (MAX_SHARE * step_s)) if step_s > 0.0 else 0

    def next_break_even_gain(self) -> float:
        """Return what the gains of the next step must sum to, in units of a draft token's cost; see `propose_batch`."""
        if self.policy != "budget" or not self.cost_is_known or self._probing:
            return 0.0
        self._steps_to_undrafted -= 1
        if self._steps_to_undrafted <= 0:
            self._steps_to_undrafted = UNDRAFTED_EVERY
            return math.inf
        return self._break_even_gain

    def plan(
        self, problems_N: npt.NDArray[np.int64], generated_N: npt.NDArray[np.int64], limits_N: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float32]]:
        """Return longest drafts and least path probabilities for the live requests.

        Args:
            problems_N: keys.
            generated_N: response tokens so far.
            limits_N: most response tokens that each request may still generate, at least 1.
        """
        started = time.perf_counter()
        n, surprise = len(problems_N), self._surprise
        self._surprise, self._steps_of_probe = 0.0, 0
        max_draft_tokens_N = np.minimum(np.full(n, self.max_draft), np.maximum(limits_N - 1, 0)).astype(np.uint32)
        if self.policy == "fixed" or (self.policy == "budget" and not self.timed):
            min_path_probs_N = np.zeros(n, np.float32)
        elif self.policy == "classes":
            min_path_probs_N = np.zeros(n, np.float32)
            allowed_N = budget.class_max_draft(self.lengths.length_class(problems_N, generated_N), self.max_draft)
            max_draft_tokens_N = np.minimum(max_draft_tokens_N, allowed_N.astype(np.uint32))
        else:
            self._probing = self.probing or (self._probing and surprise < CHEAPER)
            if self._probing:
                min_path_probs_N = np.full(n, FIRST_MIN_PATH_PROB, np.float32)
            else:
                min_path_probs_N = self._min_path_probs(problems_N, generated_N, limits_N)
        self.last_plan_s = time.perf_counter() - started
        return max_draft_tokens_N, min_path_probs_N

    def _min_path_probs(self, problems_N: Any, generated_N: Any, limits_N: Any) -> npt.NDArray[np.float32]:
        n = len(problems_N)
        equal_N = np.full(n, self.cost.base_s / n)
        if len(self.lengths) == 0:
            return self._break_even_probs(equal_N)
        num_scenarios = min(max(SCENARIO_CELLS // n, 8), 128)
        left_SN = self.lengths.remaining(
            problems_N, generated_N, num_scenarios, self._rng, max_remaining=np.maximum(limits_N, 1)
        )
        k = float(np.clip(self._accepted / (1.0 + self._accepted), 0.05, 0.98))
        alpha = max(self._first, 0.02) / k
        last_N = budget.expected_multipliers(np.maximum(left_SN, 1.0), k, alpha, self.cost)
        return self._break_even_probs(EQUAL_SHARE * equal_N + (1.0 - EQUAL_SHARE) * last_N)

    def _break_even_probs(self, multipliers_N: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        min_path_probs_N = budget.min_path_probs(multipliers_N, self.cost)
        cost_s = float((min_path_probs_N * (multipliers_N + self.cost.per_request_s)).mean())
        self._break_even_gain = self.cost.speculation_s / cost_s if math.isfinite(cost_s) and cost_s > 0.0 else 0.0
        return min_path_probs_N

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned, in plain numbers and, under `lengths`, arrays."""
        return {
            "cost": self.cost.state_dict(),
            "lengths": self.lengths.state_dict(),
            "accepted": self._accepted,
            "first": self._first,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what was learned before; step times are learned anew where the machine may be another.

        Raises:
            DraftError: if the content is not a state.
        """
        cost, lengths = StepCostModel(), LengthModel(self.lengths.max_problems)
        try:
            cost.load_state_dict(state["cost"])
            lengths.load_state_dict(state["lengths"])
            accepted, first = float(state["accepted"]), float(state["first"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DraftError(f"not a saved state of the draft planner ({error!r})") from error
        if not (0.0 <= accepted < 1e3 and 0.0 <= first <= 1.0):
            raise DraftError("not a saved state of the draft planner (acceptance out of range)")
        self.cost, self.lengths, self._accepted, self._first = cost, lengths, accepted, first
        self.cost_is_known = cost.ready
