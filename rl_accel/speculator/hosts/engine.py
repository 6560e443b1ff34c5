"""The speculator in a rollout engine: its head as a source of drafts, its trainer, and what they cost and bring."""

from __future__ import annotations

import os
from typing import Any

from rl_accel.feature import Engine, load
from rl_accel.speculator.hosts.source import Source

SOURCES = {
    "recurrent": "rl_accel.speculator.hosts.head_source:HeadSource",
    "eagle3": "rl_accel.speculator.hosts.eagle_source:EagleSource",
}
"""Kind of the head -> how it comes to draft."""


class SpeculatorEngine(Engine):
    """Acts on the rank whose drafts vLLM uses."""

    source: Source | None = None

    def install(self, runner: Any) -> None:
        from rl_accel.hosts.vllm.ranks import is_output_rank

        if hasattr(runner, "rejection_sampler"):  # the last pipeline rank
            source = load(SOURCES[self.settings.head])
            self.source = source(self.settings, self.vllm_config, runner.rl_accel_faults)
            self.source.attach(runner, acts=is_output_rank(self.vllm_config))

    def draft_source(self) -> Source | None:
        return self.source if self.source is not None and self.source.gives_candidates else None

    def live(self) -> str:
        return "learning" if self.settings.learn else "serving"

    def on_weights(self, runner: Any, seconds: float) -> None:
        """The policy has moved: traces are of the next version from here on."""
        if self.source is not None and self.source.tap is not None:
            self.source.tap.policy_version += 1

    def drain(self) -> dict[str, float]:
        return self.source.drain() if self.source is not None else {}

    def save(self, path: str) -> dict[str, Any]:
        """Have head, optimizer and version written to `path`."""
        if self.source is None or self.source.client is None:
            return {}
        return self.source.client.ask("save", path=os.path.abspath(path))

    def open(self, path: str) -> dict[str, Any]:
        """Go on with what `save` wrote."""
        if self.source is None or self.source.client is None:
            return {}
        answer = self.source.client.ask("open", path=os.path.abspath(path))
        self.source.go_on()
        return answer
