"""The token ids of every training rollout, for `rl_accel.compare`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from rl_accel.compare.tokens import save_tokens
from rl_accel.feature import Trainer
from rl_accel.hosts.verl.metrics import row_names


class TraceTrainer(Trainer):
    """Writes `run_dir/tokens/STEP.npz`."""

    def on_rollouts(self, step: int, epoch: int, keys: Sequence[str], rollouts: Any) -> None:
        save_rollout_tokens(os.path.join(self.trainer.accel.run_dir, "tokens", f"{step}.npz"), keys, rollouts)


def save_rollout_tokens(path: str, keys: Sequence[str], rollouts: Any) -> None:
    """Write the token ids of one step.

    An agent loop may return several outputs a session; those after the first are rows of `PROBLEM [output I]`.
    """
    names = row_names(keys, rollouts)
    save_tokens(
        path,
        problem_ids=[f"{problem} [output {output}]" if output else problem for problem, _, output in names],
        sample_indices=[sample for _, sample, _ in names],
        prompt_lengths=rollouts["prompts"].offsets().diff().tolist(),
        responses=[row.tolist() for row in rollouts["responses"].unbind()],
    )
