"""Drafting before a run starts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rl_accel.draft.config import OUR_METHODS, VLLM_HEADS, other_vocabulary
from rl_accel.draft.feature import DAS_PROPOSER
from rl_accel.errors import ConfigError
from rl_accel.feature import Driver
from rl_accel.hosts import versions
from rl_accel.hosts.verl import model_files


class DraftDriver(Driver):
    """Asks vLLM for speculation."""

    def check(self, config: DictConfig) -> None:
        if self.settings.method == "suffix" and versions.installed("arctic-inference") is None:
            raise ConfigError(
                "rl_accel.draft.method=suffix is vLLM's suffix decoding, which needs the package arctic-inference: "
                "run scripts/install_arctic.sh"
            )

    def check_run(self, config: DictConfig) -> None:
        if self.settings.record and not self.accel.run_dir:
            raise ConfigError("rl_accel.draft.record writes into rl_accel.run_dir, which is not set")

        if self.settings.model and model_files.is_local(self.settings.model):
            folder = Path(self.settings.model).expanduser()
            if not (folder / "config.json").is_file():
                raise ConfigError(
                    f"rl_accel.draft.model={self.settings.model}: no model there (config.json is missing)"
                )
        if self.settings.method == "ahead":
            draft, policy = model_files.read(self.settings.model), model_files.policy_config(config)
            ours, theirs = (model_files.text_config(found).get("vocab_size") for found in (draft, policy))
            if isinstance(ours, int) and isinstance(theirs, int) and (problem := other_vocabulary(ours, theirs)):
                raise ConfigError(problem)

    def engine_settings(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self.settings).items() if name != "record"}

    def engine_args(self) -> dict[str, Any]:
        draft = self.settings
        if not draft.enabled:
            return {}
        if draft.method == "head" and self.accel.settings["speculator"].head in VLLM_HEADS:
            return {}  # that feature asks for vLLM's own drafter
        if draft.method in OUR_METHODS:
            return {"speculative_config": {"model": DAS_PROPOSER, "num_speculative_tokens": draft.max_draft}}
        if draft.method == "model":
            length = {"num_speculative_tokens": draft.max_draft}
            return {"speculative_config": {"method": "draft_model", "model": draft.model, **length}}
        speculative = {"method": draft.method, "num_speculative_tokens": draft.max_draft}
        if draft.method == "ngram":
            speculative["prompt_lookup_min"] = draft.prompt_lookup_min
            speculative["prompt_lookup_max"] = draft.prompt_lookup_max
        return {"speculative_config": speculative}

    def prepare(self, config: DictConfig) -> None:
        """Give the engine a draft more than the user's context length, in tokens.

        vLLM stops drafting for the whole batch while one request is within a draft of its end. The user's
        `max_model_len` goes on limiting responses, by verl: they are as long as without drafts. A model without room
        for it, or whose files are not here to ask, keeps the user's length and drafts less at its end.
        """
        rollout = config.actor_rollout_ref.rollout
        engine, asked = rollout.engine_kwargs.vllm, rollout.max_model_len
        if self.settings.enabled and asked is not None and not engine.get("max_model_len"):
            limit = model_files.max_position_embeddings(config) or asked
            engine.max_model_len = max(asked, min(asked + self.settings.max_draft, limit))

    def summary(self, config: DictConfig) -> str:
        return f"drafting by {self.settings.method}" if self.settings.enabled else ""

    def arm(self) -> str:
        return self.settings.method if self.settings.enabled else ""
