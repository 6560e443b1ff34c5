"""What the toy does in each process. Imports no host."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

from rl_accel.errors import ConfigError
from rl_accel.feature import AgentLoop, Check, Driver, Engine, Probe, Rank, Trainer
from rl_accel.patching import HostPatch


def register() -> None:
    """Runs before vLLM checks its configuration."""
    os.environ["TOY_REGISTERED"] = "1"


def seen(module: ModuleType) -> None:
    """Runs when verl has imported `verl.utils.tracking`."""
    module.toy_was_here = True


class NamePatch(HostPatch):
    """Something harmless of verl is replaced, which the metrics of the run show."""

    target = "verl.utils.tracking:FileLogger.log"
    parameters = ("self", "data", "step")

    @classmethod
    def replace(cls, module: ModuleType) -> None:
        original = module.FileLogger.log

        def log(self, data, step):
            original(self, {**data, "toy/patched": float(module.toy_was_here)}, step)

        module.FileLogger.log = log


PATCHES = (NamePatch,)


class ToyDriver(Driver):
    def check(self, config: Any) -> None:
        if self.settings.enable and config.trainer.total_training_steps == 13:
            raise ConfigError("rl_accel.toy has a dislike of 13 steps")

    def rank_settings(self, config: Any, role: str) -> dict[str, Any]:
        return {"size": self.settings.size} if role == "actor_rollout_ref.actor" else {}

    def summary(self, config: Any) -> str:
        return f"a toy of size {self.settings.size}" if self.settings.enable else ""


class ToyEngine(Engine):
    _syncs = 0
    _installed = False

    def install(self, runner: Any) -> None:
        self._installed = os.environ.get("TOY_REGISTERED") == "1" and self.settings.size == 7

    def live(self) -> bool:
        return self._installed

    def on_weights(self, runner: Any, seconds: float) -> None:
        self._syncs += 1

    def drain(self) -> dict[str, float]:
        return {"weight_syncs": float(self._syncs)}

    def double(self, number: int) -> int:
        return 2 * number


class ToyRank(Rank):
    updates = 0
    running, ran = False, 0

    def attach(self, engine: Any, optimizer: Any) -> None:
        assert self.settings["size"] == 7 and next(engine.parameters()) is not None and optimizer is not None

    def begin_inference(self, micro_batch: Any) -> None:
        assert not self.running and len(micro_batch["input_ids"])
        self.running = True

    def end_inference(self) -> None:
        assert self.running
        self.running, self.ran = False, self.ran + 1

    def begin_update(self) -> None:
        assert not self.running
        self.updates += 1

    def metrics(self) -> dict[str, float]:
        return {"updates": float(self.updates), "micro_batches": float(self.ran)}

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]


class ToyAgentLoop(AgentLoop):
    def sampling_params(self, sampling_params: dict[str, Any]) -> dict[str, Any]:
        return {**sampling_params, "extra_args": {**(sampling_params.get("extra_args") or {}), "toy": 1}}


class ToyTrainer(Trainer):
    steps = 0

    def on_init_end(self) -> None:
        assert self.trainer.engines.call("toy", "double", 21) == [42]

    def on_step_end(self) -> None:
        self.steps += 1

    def metrics(self) -> dict[str, float]:
        return {"steps": float(self.steps)}

    def save(self) -> None:
        folder = self.trainer.feature_folder(self.feature.name)
        folder.mkdir(parents=True)
        (folder / "steps").write_text(str(self.steps + 1))  # the step is saved before it ends

    def restore(self) -> None:
        self.steps = int((self.trainer.feature_folder(self.feature.name) / "steps").read_text())


class ToyProbe(Probe):
    def checks(self) -> list[Check]:
        return [Check("size", self.settings.size == 7, str(self.settings.size))]

    def engine_checks(self, found: Any) -> list[Check]:
        return [Check("engine answered", bool(found["live"]))]
