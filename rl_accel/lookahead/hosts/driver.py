"""Lookahead before a run starts."""

from __future__ import annotations

from urllib.parse import urlsplit

from omegaconf import DictConfig

from rl_accel.draft.config import OUR_METHODS
from rl_accel.errors import ConfigError
from rl_accel.feature import Driver
from rl_accel.hosts.verl import model_files


class LookaheadDriver(Driver):
    """Refuses what would be found out in the first text."""

    def check(self, config: DictConfig) -> None:
        settings = self.settings
        if not settings.enabled:
            return
        rollout = config.actor_rollout_ref.rollout
        if rollout.name != "vllm":
            raise ConfigError(f"rl_accel.lookahead serves rollout.name=vllm; it is {rollout.name}")
        if rollout.get("enable_rollout_routing_replay"):
            raise ConfigError(
                "rl_accel.lookahead writes by steps, which bring no routed experts; "
                "set rollout.enable_rollout_routing_replay=false"
            )
        lora = config.actor_rollout_ref.model.get("lora") or {}
        if config.actor_rollout_ref.model.get("lora_rank", 0) or (lora.get("rank", 0) and not lora.get("merge")):
            raise ConfigError("rl_accel.lookahead asks for the base model, not for a LoRA adapter; switch one off")
        method = self.accel.settings["draft"].method
        if settings.hint and method not in OUR_METHODS:
            raise ConfigError(
                f"rl_accel.lookahead.hint=true gives drafts to rl_accel.draft.method={', '.join(OUR_METHODS)}; "
                f"it is {method}"
            )
        if "://" in settings.draft:
            found = urlsplit(settings.draft)
            if found.scheme not in ("http", "https") or not found.netloc:
                raise ConfigError(f"rl_accel.lookahead.draft={settings.draft} is no http URL")
        elif config.trainer.device != "cpu" and not settings.draft_gpus:
            raise ConfigError(
                f"rl_accel.lookahead.draft={settings.draft} is a model, for which the run starts a server; give it a "
                "GPU that verl leaves free, rl_accel.lookahead.draft_gpus=1, or name the URL of a server"
            )

    def check_run(self, config: DictConfig) -> None:
        settings = self.settings
        if not settings.enabled or "://" in settings.draft:
            return
        draft = model_files.text_config(model_files.read(settings.draft))
        if not draft and model_files.is_local(settings.draft):
            raise ConfigError(f"rl_accel.lookahead.draft={settings.draft}: no model there (config.json is missing)")
        policy = model_files.text_config(model_files.policy_config(config))
        sizes = [found.get("vocab_size") for found in (draft, policy)]
        if all(sizes) and sizes[0] != sizes[1]:
            raise ConfigError(
                f"rl_accel.lookahead.draft={settings.draft} has {sizes[0]} tokens and the policy {sizes[1]}; both need "
                "one tokenizer"
            )

    def summary(self, config: DictConfig) -> str:
        settings = self.settings
        if not settings.enabled:
            return ""
        lossy = "" if settings.lossless else ", lossy"
        return f"lookahead by {settings.draft} in {settings.phases} ({settings.verifier}{lossy})"

    def arm(self) -> str:
        return "lookahead" if self.settings.enabled else ""
