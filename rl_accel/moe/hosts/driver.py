"""Low-bit experts before a run starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rl_accel.errors import ConfigError, MoEError
from rl_accel.feature import Driver
from rl_accel.hosts import versions
from rl_accel.hosts.verl import FOLDER, model_files
from rl_accel.kernels.moe_int3.widths import check_width
from rl_accel.moe.config import QUANTIZATION

MIN_VLLM = (0, 28)
"""Older ones have no layer of experts of their own (`RoutedExperts`)."""
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
EXPERT_SIZES = ("moe_intermediate_size", "intermediate_size")


class MoEDriver(Driver):
    """Refuses what cannot work, and writes the plan of bits and ranks for the engines. Acts on plain commands, too:
    they may ask vLLM for the method without permitting what it loses."""

    always = True

    def check_engine_args(self, args: Mapping[str, Any], on_gpu: bool) -> None:
        if not self.settings.enabled and args.get("quantization") == QUANTIZATION:
            raise ConfigError(
                f"engine_kwargs.vllm.quantization={QUANTIZATION} needs rl_accel.moe.enable=true "
                "rl_accel.allow_lossy=true, which set it themselves"
            )

    def check(self, config: DictConfig) -> None:
        if not self.settings.enabled:
            return
        if versions.is_older("vllm", MIN_VLLM):
            raise ConfigError(
                f"rl_accel.moe.enable=true needs vLLM {'.'.join(map(str, MIN_VLLM))} or newer; installed is "
                f"{versions.installed('vllm')}"
            )
        policy = model_files.text_config(model_files.policy_config(config))
        if policy.get("hidden_size") and not any(policy.get(name) for name in EXPERT_COUNTS):
            raise ConfigError(
                f"rl_accel.moe.enable=true: the policy {config.actor_rollout_ref.model.path} has no experts; choose a "
                "mixture-of-experts policy (recipe size cpu_moe) or set enable=false"
            )
        rollout = config.actor_rollout_ref.rollout
        shards = int(rollout.get("tensor_model_parallel_size", 1) or 1)
        self._check_widths(policy, shards)
        if self.settings.refresh == "warm" and shards > 1:
            raise ConfigError("rl_accel.moe.refresh=warm serves tensor_model_parallel_size=1; use refresh=cold")

    def _check_widths(self, policy: Mapping[str, Any], shards: int) -> None:
        size = next((policy[name] for name in EXPERT_SIZES if policy.get(name)), None)
        for what, width in (("hidden_size", policy.get("hidden_size")), ("an expert's size", size and size // shards)):
            if not width:
                continue
            try:
                check_width(self.settings.bits, self.settings.group_size, int(width))
            except MoEError as error:
                raise ConfigError(
                    f"rl_accel.moe.group_size={self.settings.group_size} with tensor_model_parallel_size={shards}: "
                    f"{what}: {error}"
                ) from None

    def engine_args(self) -> dict[str, Any]:
        return {"quantization": QUANTIZATION} if self.settings.enabled else {}

    def prepare(self, config: DictConfig) -> None:
        """
        Raises:
            ConfigError: if bits and ranks depend on weights that are not here.
        """
        if not self.settings.enabled or self.settings.plan or not self.settings.needs_weights:
            return
        from rl_accel.moe import plan as plans  # imports torch

        folder = Path(os.path.abspath(config.trainer.default_local_dir)) / FOLDER / self.feature.name
        try:
            plan = plans.make(self.settings, config.actor_rollout_ref.model.path)
        except MoEError as error:
            raise ConfigError(f"rl_accel.moe.ranks={self.settings.ranks}: {error}") from None
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "plan.json"
        plans.save(plan, file)
        config.actor_rollout_ref.rollout.engine_kwargs.vllm.additional_config.rl_accel.moe.plan = str(file)

    def summary(self, config: DictConfig) -> str:
        if not self.settings.enabled:
            return ""
        what = f"{self.settings.budget_bits}" if self.settings.ranks == "budget" else f"{self.settings.bits}"
        return f"experts in {what} bits, rank {self.settings.rank} (lossy)"

    def arm(self) -> str:
        return f"int{self.settings.bits}moe" if self.settings.enabled else ""
