"""The features that act on one training rank, together; training engines call them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rl_accel.errors import ConfigError
from rl_accel.feature import Rank, features


class Ranks:
    """Made of the field `rl_accel` of an engine's settings: feature -> settings of its `Rank`."""

    def __init__(self, settings: Mapping[str, Mapping[str, Any]] | None):
        unknown = set(settings or {}) - set(features())
        if unknown:
            raise ConfigError(
                f"engine settings name features that are not installed here: {', '.join(sorted(unknown))}"
            )
        self.roles: dict[str, Rank] = {
            name: features()[name].role("rank")(dict(values)) for name, values in (settings or {}).items()
        }

    def __bool__(self) -> bool:
        return bool(self.roles)

    def attach(self, engine: Any, optimizer: Any) -> None:
        """Bind all to a `DeepSpeedEngine` or the root module of FSDP2."""
        for role in self.roles.values():
            role.attach(engine, optimizer)

    def held_weights(self) -> Iterator[tuple[str, Any]] | None:
        """Return the whole weights that the model computes with, if a feature keeps others than its parameters."""
        found = self._held()
        return next(iter(found.values())) if found else None

    def holder(self) -> str:
        """Return whose weights `held_weights` are: the settings of that feature."""
        return f"rl_accel.{next(iter(self._held()))}"

    def _held(self) -> dict[str, Iterator[tuple[str, Any]]]:
        found = {name: role.held_weights() for name, role in self.roles.items()}
        return {name: weights for name, weights in found.items() if weights is not None}

    @contextmanager
    def inference(self, micro_batch: Any) -> Iterator[None]:
        """In here the model runs over a micro-batch without gradients."""
        for role in self.roles.values():
            role.begin_inference(micro_batch)
        try:
            yield
        finally:
            for role in self.roles.values():
                role.end_inference()

    def begin_update(self) -> None:
        for role in self.roles.values():
            role.begin_update()

    def metrics(self) -> dict[str, list[float]]:
        """Return the numbers of the update by their full names; each a list, which verl joins over ranks and updates
        and averages."""
        return {
            f"rl_accel/{name}/{metric}": [float(value)]
            for name, role in self.roles.items()
            for metric, value in role.metrics().items()
            if features()[name].metric(metric)
        }

    def state_dict(self) -> dict[str, dict[str, Any]]:
        return {name: role.state_dict() for name, role in self.roles.items()}

    def load_state_dict(self, states: Mapping[str, dict[str, Any]]) -> None:
        """Restore what is there; a feature that was off when the checkpoint was written starts anew."""
        for name, role in self.roles.items():
            if states.get(name):
                role.load_state_dict(states[name])
