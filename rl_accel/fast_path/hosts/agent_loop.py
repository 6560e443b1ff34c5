"""What a session asks of the engine, and its reward."""

from __future__ import annotations

from typing import Any

from rl_accel.fast_path.hosts.reward import LocalReward
from rl_accel.feature import AgentLoop


class FastAgentLoop(AgentLoop):
    """Final outputs only, and the built-in reward in place."""

    def __init__(self, settings: Any, worker: Any):
        super().__init__(settings, worker)
        self._reward = LocalReward(worker.config, worker.tokenizer)

    def sampling_params(self, sampling_params: dict[str, Any]) -> dict[str, Any]:
        return final_output_only(sampling_params)

    def score(self, output: Any, sample: dict[str, Any]) -> bool:
        if not self._reward.applies:
            return False
        self._reward.score(output, sample)
        return True


def final_output_only(sampling_params: dict[str, Any]) -> dict[str, Any]:
    """Ask the engine for one output a request, without text; stop strings need text and leave it as it is."""
    if sampling_params.get("stop") or sampling_params.get("detokenize"):
        return sampling_params
    from vllm.sampling_params import RequestOutputKind

    return {**sampling_params, "detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}
