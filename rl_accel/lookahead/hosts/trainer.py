"""Lookahead in verl's trainer: the draft's server, and that both engines answer before the first text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray

from rl_accel.errors import ConfigError, NotLiveError
from rl_accel.feature import Feature, Trainer
from rl_accel.lookahead.hosts.draft_server import NAME, DraftServer, serve_arguments
from rl_accel.lookahead.hosts.reach import missing
from rl_accel.lookahead.text import delimiter_ids
from rl_accel.quickstart.deep import shipped_policy


class LookaheadTrainer(Trainer):
    """Starts the draft's server while the policy's engines come up."""

    def __init__(self, feature: Feature, settings: Any, trainer: Any):
        super().__init__(feature, settings, trainer)
        sampling = trainer.accel.settings["sampling"]
        arguments = serve_arguments(
            settings, trainer.config.actor_rollout_ref.rollout, sampling.seed if sampling.exact else None
        )
        folder = trainer.accel.run_dir or trainer.config.trainer.default_local_dir
        log = Path(os.path.abspath(folder)) / "draft_server.log"
        # Exact sampling needs vLLM's V1 runner; CPU engines share the cores that there are.
        env = {"VLLM_USE_V2_MODEL_RUNNER": "0"} if sampling.exact else {}
        server: Any = ray.remote(num_cpus=0, num_gpus=settings.draft_gpus)(DraftServer)
        self._server: Any = server.options(name=NAME).remote(shipped_policy(settings.draft), arguments, str(log), env)

    def on_init_end(self) -> None:
        """
        Raises:
            ConfigError: if no token ends a step.
            NotLiveError: if the draft, or a server of the policy, does not write a token for a prompt of one.
        """
        if not delimiter_ids(self.trainer.tokenizer, self.settings.delimiter):
            raise ConfigError(
                f"rl_accel.lookahead.delimiter={self.settings.delimiter!r}: no token of the policy holds it, so "
                "steps would never end"
            )
        try:
            draft = ray.get(self._server.url.remote())
        except ray.exceptions.RayTaskError as error:
            raise NotLiveError(f"rl_accel.lookahead.draft={self.settings.draft}: {error.cause}") from error
        servers = [f"http://{replica._server_address}" for replica in self._replicas()]
        for what, url in [("draft server", draft), *(("rollout server", server) for server in servers)]:
            if reason := missing(url):
                raise NotLiveError(f"lookahead was asked for, and the {what} {url} does not write: {reason}")

    def on_end(self) -> None:
        ray.get(self._server.stop.remote())

    def _replicas(self) -> list[Any]:
        return self.trainer.llm_server_manager.get_replicas()
