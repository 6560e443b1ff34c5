"""Drafting in a rollout engine: that vLLM speculates, and the calls of the trainer to the DAS proposer."""

from __future__ import annotations

from typing import Any

from rl_accel.draft.config import OUR_METHODS, VLLM_HEADS
from rl_accel.draft.feature import DAS_PROPOSER
from rl_accel.draft.hosts import last_drafts
from rl_accel.draft.hosts.ahead_source import AheadSource
from rl_accel.draft.hosts.proposer import DRAFTING_OFF, UNDRAFTED, stop_token_ids
from rl_accel.errors import NotLiveError
from rl_accel.feature import Engine
from rl_accel.hosts.vllm.ranks import is_output_rank


class DraftEngine(Engine):
    """With another method than `das`, vLLM's own drafter does everything."""

    _proposer: Any = None
    _ahead: AheadSource | None = None
    _faults: Any = None

    def __init__(self, settings: Any, vllm_config: Any):
        """
        Raises:
            NotLiveError: if vLLM does not speculate, or drafts by something else.
        """
        super().__init__(settings, vllm_config)
        if vllm_config.speculative_config is None:
            raise NotLiveError(
                f"rl_accel.draft.method is {self.settings.method!r}, but vLLM was started without speculative_config; "
                "pass one, or set rl_accel.draft.method=none"
            )
        speculative = vllm_config.speculative_config
        by_vllm = self.settings.method == "head" and speculative.method in VLLM_HEADS
        self._ours = self.settings.method in OUR_METHODS and not by_vllm
        if self._ours and getattr(speculative, "model", None) != DAS_PROPOSER:
            raise NotLiveError(
                f"rl_accel.draft.method is {self.settings.method!r}, but speculative_config names another drafter; "
                f"its model must be {DAS_PROPOSER}"
            )

    def installed(self, runner: Any) -> None:
        self._faults = runner.rl_accel_faults
        if self._ours and hasattr(runner, "rejection_sampler"):
            self._proposer = runner.drafter
            sources = [role.draft_source() for role in runner.rl_accel.values()]
            source = next((source for source in sources if source is not None), None)
            if self.settings.method == "ahead" and is_output_rank(self.vllm_config):
                stops = stop_token_ids(self.vllm_config.model_config)
                source = self._ahead = AheadSource(self.settings, self.vllm_config, runner, stops)
            self._proposer.attach(runner, source)
        if self.settings.method == "model":
            last_drafts.install(runner)

    def live(self) -> str:
        return self.settings.method

    def drain(self) -> dict[str, float]:
        faults = {kind: float(self._faults.counts[kind]) for kind in (UNDRAFTED, DRAFTING_OFF)}
        found = faults | (self._proposer.drain_metrics() if self._proposer is not None else {})
        return found | (self._ahead.drain() if self._ahead is not None else {})

    def close_epoch(self, epoch: int, policy_version: int, share: bool) -> dict[str, Any]:
        """Close an epoch of history; with `share` its segments will be asked for. {} on ranks without history."""
        return self._proposer.close_epoch(epoch, policy_version, share)

    def take_segment(self) -> bytes:
        """Return a segment that other engines have not been given yet, b"" if there is none."""
        return self._proposer.take_segment()

    def add_segment(self, segment: bytes) -> bool:
        """Take a segment of another engine."""
        return self._proposer.add_segment(segment)

    def save(self, path: str) -> dict[str, Any]:
        """Write a snapshot of the history, or say why not."""
        return self._proposer.save(path)

    def open(self, path: str) -> dict[str, Any]:
        """Replace the history by a snapshot's, or say why not."""
        return self._proposer.open(path)
