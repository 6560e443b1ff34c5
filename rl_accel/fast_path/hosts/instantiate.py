"""The agent loop's class is looked up and called. Takes 4 ms a request off (the stock way resolves a configuration)."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

from rl_accel.patching import HostPatch


class InstantiateDirectly(HostPatch):
    """`hydra.utils.instantiate` resolves and copies a configuration that here is `{"_target_": class}` only."""

    target = "verl.experimental.agent_loop.agent_loop:hydra"

    @classmethod
    def replace(cls, module: Any) -> None:
        from hydra.utils import get_class, instantiate

        def direct(config: Any, **kwargs: Any) -> Any:
            if set(config) == {"_target_"}:
                return get_class(config["_target_"])(**kwargs)
            return instantiate(config=config, **kwargs)

        module.hydra = SimpleNamespace(utils=SimpleNamespace(instantiate=direct))

    @classmethod
    def is_live(cls, module: ModuleType) -> bool:
        return isinstance(module.hydra, SimpleNamespace)
