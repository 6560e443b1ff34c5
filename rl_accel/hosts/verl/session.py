"""What an agent loop gets as its `server_manager`: verl's client, which names every generation of the session.

A loop may generate as often as it likes, on whatever prompts, one after another or at once, with sampling parameters of
its own; each generation gets the identity of the session and a number of its own (`CallNumbers`). A generation that
verl's client sends again, because the engine was interrupted for new weights, keeps its number, since the client is
inside. Left out: requests that a loop sends to an engine by another way, such as its HTTP port; they are anonymous.

Host symbols: `LLMServerClient.generate`.
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from typing import Any

from verl.utils import normalize_token_ids

from rl_accel.identity import FIELD, CallNumbers


class SessionClient:
    """The client of one session; everything but `generate` is the inner client's.

    Args:
        client: verl's `LLMServerClient`.
        identity: problem_id, sample_index, step and validate of the session.
    """

    def __init__(self, client: Any, identity: Mapping[str, Any]):
        self._client, self._identity, self._calls = client, identity, CallNumbers()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_client" not in self.__dict__:  # asked while it is being copied
            raise AttributeError(name)
        return getattr(self._client, name)

    def generate(
        self, request_id: str, *, prompt_ids: Any, sampling_params: Mapping[str, Any], **kwargs: Any
    ) -> Coroutine[Any, Any, Any]:
        """Return the inner client's coroutine. The number is taken now, not when it is first awaited."""
        call = self._calls.next(normalize_token_ids(prompt_ids))
        extra_args = {**(sampling_params.get("extra_args") or {}), FIELD: {**self._identity, "call": call}}
        return self._client.generate(
            request_id, prompt_ids=prompt_ids, sampling_params={**sampling_params, "extra_args": extra_args}, **kwargs
        )
