"""Keys of exact sampling: 64 bits that name one generation of a rollout, in every process the same."""

from __future__ import annotations

import json

from rl_accel.identity import hash64


def request_key(seed: int, problem_id: str, sample_index: int, step: int, validate: bool, call: int = 0) -> int:
    """Return the 64-bit key of one generation of a rollout, the same in every process.

    Args:
        seed: the configured seed of the run.
        problem_id: stable name of the problem, such as a data-set id.
        sample_index: which of the samples of this problem in this step.
        step: training step, so that a problem drawn again gets new noise.
        validate: whether the rollout belongs to validation, which shares step numbers with training.
        call: which generation of the rollout; 0 is the first (`identity.CallNumbers`).

    Returns:
        signed int64, uniform over the arguments (BLAKE2b, 8 bytes).
    """
    identity = [int(seed), str(problem_id), int(sample_index), int(step), bool(validate)]
    if call:
        identity.append(int(call))
    return hash64(json.dumps(identity).encode())
