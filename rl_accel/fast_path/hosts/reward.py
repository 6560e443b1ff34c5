"""The built-in rule-based reward, called in the process that has the response."""

from __future__ import annotations

import time
from typing import Any

OUR_REWARD = "pkg://rl_accel.quickstart.reward"


class LocalReward:
    """The built-in reward as verl's `naive` reward manager computes it, in the process that has the response.

    It takes microseconds; a batch of one for another Ray process takes milliseconds.
    """

    def __init__(self, config: Any, tokenizer: Any):
        self.tokenizer = tokenizer
        reward = config.reward
        self.applies = (
            reward.custom_reward_function.path == OUR_REWARD
            and reward.reward_manager.source == "register"
            and reward.reward_manager.name == "naive"
            and not reward.reward_model.enable
        )

    def score(self, output: Any, sample: dict[str, Any]) -> None:
        """Set `reward_score` and `reward_extra_info` of an `AgentLoopOutput`; `sample` is its row of the data set."""
        from rl_accel.quickstart.reward import compute_score

        started = time.perf_counter()
        text = self.tokenizer.decode(output.response_ids, skip_special_tokens=True)
        result = compute_score(sample["data_source"], text, sample["reward_model"]["ground_truth"])
        output.reward_score = result["score"]
        output.extra_fields["reward_extra_info"] = result
        output.metrics.compute_score = time.perf_counter() - started
