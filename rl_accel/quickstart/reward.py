"""The GSM8K reward: 1 if the number after `####` is the right one, else 0. Computed by verl's own GSM8K scorer."""

from __future__ import annotations

from typing import Any


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **kwargs: Any
) -> dict[str, float]:
    """Return `score`, the reward, and `acc`, which verl reports as validation accuracy.

    The signature is that of verl's `reward.custom_reward_function`.
    """
    from verl.utils.reward_score.gsm8k import compute_score as gsm8k_score

    score = float(gsm8k_score(solution_str, ground_truth))
    return {"score": score, "acc": score}
