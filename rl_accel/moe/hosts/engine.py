"""Low-bit experts in a rollout engine: that every layer has them, made of the last weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rl_accel.errors import MoEError, NotLiveError, WeightSyncError
from rl_accel.feature import Engine
from rl_accel.moe.config import QUANTIZATION
from rl_accel.moe.refresh import Refresher


class MoEEngine(Engine):
    """Checks, counts, saves; the work is in `layers.py` and `packed.py`."""

    layerwise_sync = True

    def __init__(self, settings: Any, vllm_config: Any):
        """
        Raises:
            NotLiveError: if vLLM was not asked for the method.
        """
        super().__init__(settings, vllm_config)
        if vllm_config.model_config.quantization != QUANTIZATION:
            raise NotLiveError(
                f"rl_accel.moe.enable=true needs vLLM's quantization={QUANTIZATION}; the engine was given "
                f"{vllm_config.model_config.quantization}"
            )
        self._methods: dict[str, Any] = {}
        self._speed: dict[str, float] = {}
        self._version, self._seconds = 0, 0.0

    @property
    def refresher(self) -> Refresher:
        found: Refresher = self.vllm_config.quant_config.refresher
        return found

    def loaded(self, runner: Any) -> None:
        """
        Raises:
            NotLiveError: if a layer of experts computes by anything else, or there is none.
        """
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.layers.fused_moe import RoutedExperts

        from rl_accel.moe.hosts import speed

        for name, module in runner.model.named_modules():
            method = getattr(module, "quant_method", None)
            if isinstance(module, RoutedExperts) and not hasattr(method, "refresher"):
                raise NotLiveError(f"rl_accel.moe is on, but {name} computes experts by {type(method).__name__}")
            if hasattr(method, "refresher"):
                self._methods[name] = method
        if not self._methods:
            raise NotLiveError("rl_accel.moe is on, but this model has no layer of experts")
        packed = [m for m in runner.model.modules() if isinstance(m, RoutedExperts) and m.quant_method.mode == "packed"]
        if packed and packed[0].quant_method.on_cpu:
            with set_current_vllm_config(runner.vllm_config):
                self._speed = speed.measure(packed)
        self._version = max(self.refresher.versions.values(), default=0)
        self.refresher.forget()  # weights that may be placeholders

    def on_weights(self, runner: Any, seconds: float) -> None:
        """
        Raises:
            WeightSyncError: if a layer still holds experts of earlier weights.
        """
        self._version, self._seconds = self._version + 1, self.refresher.tally.seconds
        try:
            self.refresher.check_version(self._version)
        except MoEError as error:
            raise WeightSyncError(str(error)) from None

    def expected_weight(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        name = name.replace(".routed_experts.", ".")
        return self.refresher.expected(name, weight) if name in self.refresher.versions else weight

    def live(self) -> dict[str, Any]:
        """Return how many tensors have how many bits, their bits all in, how layers compute, and, where that is in
        packed bytes on a CPU, stock's time over theirs."""
        plan = self.refresher.plan
        return {
            "mode": sorted({method.mode for method in self._methods.values()}),
            "tensors": {bits: sum(t.bits == bits for t in plan.values()) for bits in {t.bits for t in plan.values()}},
            "bits_per_weight": round(self.refresher.bits_per_weight(), 3),
            **({"speed_against_stock": self._speed} if self._speed else {}),
        }

    def set_alternations(self, alternations: int) -> int:
        """Bound what the next refreshes do; returns the bound."""
        self.refresher.alternations = alternations
        return alternations

    def last_refresh_seconds(self) -> float:
        """Return what the refresh of the last weights took, also after it was drained."""
        return self._seconds

    def save(self, file: str) -> None:
        """Write what a warm refresh goes on from."""
        self.refresher.save(Path(file))

    def restore(self, file: str) -> None:
        self.refresher.restore(Path(file))

    def drain(self) -> dict[str, float]:
        tally = self.refresher.drain()
        found = {"bits_per_weight": self.refresher.bits_per_weight(), "version": float(self._version)}
        if tally.tensors:
            found |= {
                "refresh_s": tally.seconds,
                "error": sum(tally.errors) / len(tally.errors),
                "alternations": sum(tally.alternations) / len(tally.alternations),
            }
        return found
