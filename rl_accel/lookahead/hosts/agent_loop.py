"""Lookahead in an agent-loop worker of verl: what its sessions share."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import ray

from rl_accel.feature import AgentLoop
from rl_accel.lookahead.core import Limits
from rl_accel.lookahead.endpoint import TokenEndpoint, open_session
from rl_accel.lookahead.feature import COUNTED
from rl_accel.lookahead.hosts.client import LookaheadClient, mask_drafts
from rl_accel.lookahead.hosts.draft_server import NAME
from rl_accel.lookahead.step import Verifier
from rl_accel.lookahead.switch import Switch
from rl_accel.lookahead.text import delimiter_ids
from rl_accel.lookahead.verifiers import for_sampling, make_verifier

logger = logging.getLogger(__name__)

PHASES = {False: "training", True: "validation"}


class LookaheadAgentLoop(AgentLoop):
    """Gives sessions a client that writes step by step; counts what came of it."""

    def __init__(self, settings: Any, worker: Any):
        super().__init__(settings, worker)
        rollout = worker.config.actor_rollout_ref.rollout
        self._rollout = rollout
        self.defaults = {
            "repetition_penalty": rollout.get("repetition_penalty", 1.0),
            "ignore_eos": rollout.get("ignore_eos", False),
        }
        self.delimiters = tuple(delimiter_ids(worker.tokenizer, settings.delimiter))
        end = worker.tokenizer.eos_token_id
        self.end_token_ids = () if end is None or self.defaults["ignore_eos"] else (end,)
        self.switch = Switch(settings.depth, always=not settings.adaptive)
        self.counts: dict[bool, Counter[str]] = {validate: Counter() for validate in PHASES}
        self._url: str | None = None
        self._session: Any = None
        self._warned = False
        self._verifiers: dict[str, Verifier] = {}
        """By the server of the policy whose texts they judge."""
        self._verifier_cost = (0, 0.0)
        """Calls and seconds that were drained."""

    def client(self, client: Any, validate: bool) -> Any:
        return LookaheadClient(client, self, validate) if self.settings.serves(validate) else client

    def finish(self, outputs: Sequence[Any], client: Any) -> None:
        if isinstance(client, LookaheadClient):
            mask_drafts(outputs, client.generated)

    def drain(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for validate, phase in PHASES.items():
            counts, self.counts[validate] = self.counts[validate], Counter()
            if self.settings.serves(validate):
                found |= {f"{phase}/{name}": float(counts[name]) for name, *_ in COUNTED}
                if counts["steps"]:
                    found[f"{phase}/agreement"] = counts["steps_from_draft"] / counts["steps"]
        found |= {f"gain/{texts}": gain for texts, gain in self.switch.gains().items()}
        if costs := [verifier.cost for verifier in self._verifiers.values() if hasattr(verifier, "cost")]:
            now = sum(cost.calls for cost in costs), sum(cost.seconds for cost in costs)
            before, self._verifier_cost = self._verifier_cost, now
            found["verifier_calls"], found["verifier_s"] = float(now[0] - before[0]), now[1] - before[1]
            found["verifier_failures"] = float(sum(cost.failures for cost in costs))
        return found

    # For clients.

    def session(self) -> Any:
        """Return the HTTP session of this worker, whose event loop is one."""
        if self._session is None:
            self._session = open_session()
        return self._session

    async def draft_url(self) -> str:
        if self._url is None:
            self._url = await ray.get_actor(NAME).url.remote()
        assert self._url is not None
        return self._url

    def limits(self, num_prompt_tokens: int, sampling_params: Mapping[str, Any]) -> Limits:
        """Return those that verl's server would set for a prompt."""
        rollout = self._rollout
        whole = rollout.prompt_length + rollout.response_length
        asked = sampling_params.get("max_tokens") or sampling_params.get("max_new_tokens")
        wanted = asked or min(rollout.response_length, whole - num_prompt_tokens)
        room = (rollout.max_model_len or whole) - num_prompt_tokens
        return Limits(max(1, min(wanted, room)), self.settings.step_tokens)

    def verifier(self, target: TokenEndpoint) -> Verifier:
        """Return the verifier of a text that `target` writes."""
        settings, url = self.settings, target.base_url
        if url not in self._verifiers:
            self._verifiers[url] = make_verifier(
                settings.verifier, session=self.session(), target_url=url, sampling=target.sampling,
                decode=partial(self.worker.tokenizer.decode, skip_special_tokens=True),
                verifier_url=settings.verifier_url,
                verifier_model=settings.verifier_model, threshold=settings.threshold,
            )  # fmt: skip
        return for_sampling(self._verifiers[url], target.sampling)

    def warn_once(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "rl_accel: lookahead: a text cannot be written step by step (%s: %s); it is written without drafts. "
                "Counted in failed_texts; not said again", type(error).__name__, error,
            )  # fmt: skip
