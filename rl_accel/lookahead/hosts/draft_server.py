"""The Ray actor that knows where the draft is served, and serves it where the run has to."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from rl_accel.lookahead.server import Server

NAME = "rl_accel_lookahead_draft"
"""Of the actor, in the job's namespace."""
START_S = 900.0


class DraftServer:
    """Ends its server when it ends."""

    def __init__(self, draft: str, arguments: list[str], log: str, env: Mapping[str, str]):
        """
        Args:
            draft: URL of a server, or a model to serve.
        """
        is_url = "://" in draft
        self._url = draft if is_url else None
        host = ray.util.get_node_ip_address()
        self._server = None if is_url else Server(draft, arguments, Path(log), host, env)

    def url(self) -> str:
        """Return the URL when the server answers.

        Raises:
            NotLiveError: if it does not.
        """
        if self._url is None:
            assert self._server is not None
            self._url = self._server.wait(START_S)
        return self._url

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()


def serve_arguments(settings: Any, rollout: Any, seed: int | None) -> list[str]:
    """Return arguments of `vllm serve` for the draft: what it shares with the policy's engine.

    Args:
        rollout: verl's `actor_rollout_ref.rollout`.
        seed: of exact sampling, None without it.
    """
    engine = rollout.engine_kwargs.vllm
    whole = rollout.max_model_len or rollout.prompt_length + rollout.response_length
    found = ["--dtype", str(rollout.dtype), "--max-model-len", str(whole), "--generation-config", "vllm"]
    found += ["--max-num-seqs", str(rollout.max_num_seqs)]
    found += ["--enforce-eager"] if rollout.enforce_eager else []
    found += ["--block-size", str(engine.block_size)] if engine.get("block_size") else []
    if seed is not None:
        found += ["--additional-config", json.dumps({"rl_accel": {"sampling": {"exact": True, "seed": seed}}})]
    return found + shlex.split(settings.draft_args)
