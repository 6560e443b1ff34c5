"""The `rl_accel.*` settings: a few of the run's own, and a frozen dataclass per feature, validated in one place.

The same mapping is used by both entries: `python -m rl_accel.train` (block `rl_accel:` of a recipe) and the drop-in
form on a plain verl command (`+rl_accel.*`). Rollout engines are given what concerns them by the same reader.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

from rl_accel.errors import ConfigError
from rl_accel.feature import Feature, features

MAX_SEED = 2**32 - 2**16
"""numpy takes seeds of 32 bits, and hosts add the ranks of their processes."""

T = TypeVar("T")


@dataclass(frozen=True)
class RunConfig:
    """Settings that belong to no feature (`rl_accel.*`)."""

    seed: int = 0
    """Seed that a recipe derives its other seeds from."""
    run_dir: str | None = None
    """Folder of the run: metrics, tokens, checkpoints, plot. None: nothing of ours is written."""
    accept_changes: bool = False
    """Resume a run in `run_dir` also where settings differ from those that it began with."""
    allow_lossy: bool = False
    """Permit features that change what is sampled or trained."""

    def __post_init__(self) -> None:
        check_seed("rl_accel.seed", self.seed)


@dataclass(frozen=True)
class AccelConfig:
    """All settings of rl_accel. Source: ours."""

    run: RunConfig = field(default_factory=RunConfig)
    settings: Mapping[str, Any] = field(default_factory=lambda: {n: f.config() for n, f in features().items()})
    """Feature -> its settings. An attribute is looked for here first and then in `run`: `accel.seed` is
    `accel.run.seed`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("run", "settings"):  # asked while it is being copied
            raise AttributeError(name)
        if name in self.settings:
            return self.settings[name]
        return getattr(self.run, name)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any] | None) -> AccelConfig:
        """Build the settings from nested mappings.

        Raises:
            ConfigError: on an unknown key (with the nearest known one) or a value of the wrong type or range.
        """
        values = {} if values is None else values
        if not isinstance(values, Mapping):
            raise ConfigError(f"rl_accel must be a group of settings; got {values!r}")
        own = [f.name for f in fields(RunConfig)]
        for key in values:
            if key not in own and key not in features():
                raise ConfigError(unknown("rl_accel", key, [*own, *features()], what="setting"))
        run = build(RunConfig, {key: values[key] for key in own if key in values}, "rl_accel")
        settings: dict[str, Any] = {
            name: build(feature.config, values.get(name, {}), f"rl_accel.{name}")
            for name, feature in features().items()
        }
        for name, implied in _implied(settings).items():
            given = values.get(name, {})
            if isinstance(given, Mapping):
                settings[name] = build(features()[name].config, {**implied, **given}, f"rl_accel.{name}")
        return cls(run, settings)

    def enabled(self) -> list[Feature]:
        """Return the features that are on."""
        return [feature for name, feature in features().items() if self.settings[name].enabled]

    def check(self) -> None:
        """Check the features that are on against each other.

        Raises:
            ConfigError: for two that need the same position in a host, or a lossy one that was not permitted.
        """
        holders: dict[str, str] = {}
        for feature in self.enabled():
            if feature.is_lossy(self.settings[feature.name]) and not self.run.allow_lossy:
                raise ConfigError(
                    f"rl_accel.{feature.name} ({feature.title}) is lossy: it changes what is sampled or trained, "
                    "within bounds that docs/ states. Permit it with rl_accel.allow_lossy=true"
                )
            for claim in sorted(feature.claimed(self.settings[feature.name])):
                if claim in holders:
                    raise ConfigError(
                        f"rl_accel.{holders[claim]} and rl_accel.{feature.name} both need {claim}; switch one off"
                    )
                holders[claim] = feature.name


def _implied(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what features ask of each other: feature -> settings."""
    found: dict[str, dict[str, Any]] = {}
    for name, feature in features().items():
        for other, values in (feature.implies(settings[name]) if feature.implies else {}).items():
            found.setdefault(other, {}).update(values)
    return found


def build(cls: type[T], values: Mapping[str, Any], prefix: str) -> T:
    """Build a settings dataclass; ConfigError on an unknown key or a wrong type."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix} must be a group of settings; got {values!r}")
    hints = get_type_hints(cls)
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    kwargs = {}
    for key, value in values.items():
        if key not in names:
            raise ConfigError(unknown(prefix, key, names, what="setting"))
        kwargs[key] = _convert(hints[key], value, f"{prefix}.{key}")
    return cls(**kwargs)


def _convert(expected: Any, value: Any, name: str) -> Any:
    if is_dataclass(expected):
        return build(expected, value, name)  # type: ignore[arg-type]
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if expected in (int, int | None) and isinstance(value, bool):
        raise ConfigError(f"{name} must be int; got {value!r}")
    if not isinstance(value, expected):
        raise ConfigError(f"{name} must be {getattr(expected, '__name__', expected)}; got {value!r}")
    return value


def leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of nested mappings with its full name; an empty group counts as one."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_seed(name: str, seed: int) -> None:
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"{name} must be 0 to {MAX_SEED}; got {seed}")


def unknown(name: str, value: str, choices: Any, what: str = "value") -> str:
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{name}: unknown {what} {value!r}.{hint} Known: {', '.join(choices)}"
