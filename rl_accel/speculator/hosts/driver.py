"""The speculator before a run starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rl_accel.draft.config import HEAD_METHODS
from rl_accel.errors import ConfigError
from rl_accel.feature import Driver
from rl_accel.hosts.verl import model_files
from rl_accel.hosts.verl.training_roles import node, with_strategy
from rl_accel.speculator.config import refuse_history, refuse_parallel

ACTOR = "actor_rollout_ref.actor"


class SpeculatorDriver(Driver):
    """Checks that drafting asks for what there is."""

    def check(self, config: DictConfig) -> None:
        method = self.accel.settings["draft"].method
        if self.settings.enabled and method not in HEAD_METHODS:
            raise ConfigError(
                f"rl_accel.speculator.enable=true drafts with a head, and rl_accel.draft.method={method} does not ask "
                "it; set rl_accel.draft.method=auto (history and head), head, or leave it out"
            )
        if method in HEAD_METHODS and not self.settings.enabled:
            raise ConfigError(
                f"rl_accel.draft.method={method} needs rl_accel.speculator.enable=true, which is its default"
            )
        if self.settings.enabled and self.settings.head == "eagle3":
            refuse_history(method)
            rollout = config.actor_rollout_ref.rollout
            refuse_parallel(rollout.tensor_model_parallel_size, rollout.get("pipeline_model_parallel_size") or 1)
        if self.settings.state:
            raise ConfigError(
                "rl_accel.speculator.state is for rl_accel.speculator.serve; under verl the checkpoints hold the head"
            )

        actor = config.actor_rollout_ref.actor.strategy
        if self.settings.enabled and self.settings.trainer_tap and not self._serves(config, ACTOR):
            raise ConfigError(
                f"rl_accel.speculator.trainer_tap=true serves {ACTOR}.strategy=fsdp2 and deepspeed; it is {actor}; "
                "leave it out"
            )

    def check_run(self, config: DictConfig) -> None:
        if self.settings.enabled and self.settings.head == "eagle3":
            from rl_accel.speculator.hosts import draft_folder  # brings torch

            draft_folder.shape_for(model_files.text_config(model_files.policy_config(config)), self.settings)

    def engine_files(self, policy: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Where vLLM itself drafts with the head: the folder of a draft, and vLLM's settings for it."""
        if self.settings.head != "eagle3":
            return {}
        from rl_accel.speculator.hosts import draft_folder

        shape = draft_folder.shape_for(policy, self.settings)
        length = self.accel.settings["draft"].num_speculative_tokens
        return {"speculative_config": draft_folder.speculative_config(folder, shape, self.settings.seed, length)}

    def rank_settings(self, config: DictConfig, role: str) -> dict[str, Any]:
        """Return what `SpeculatorRank` needs; Ulysses cuts sequences over ranks, so that none has all layers of one."""
        settings = self.settings
        if role != ACTOR or not (settings.trainer_tap and settings.learn and self._serves(config, role)):
            return {}
        if node(config, role).get("ulysses_sequence_parallel_size", 1) > 1:
            return {}
        return {
            "history": settings.history,
            "max_share": settings.max_trace_share,
            "num_samples": int(config.actor_rollout_ref.rollout.n),
        }

    @staticmethod
    def _serves(config: DictConfig, role: str) -> bool:
        return any(role in with_strategy(config, strategy) for strategy in ("fsdp2", "deepspeed"))

    def summary(self, config: DictConfig) -> str:
        if not self.settings.enabled:
            return ""
        return "online speculator" if self.settings.learn else "speculator that does not learn"
