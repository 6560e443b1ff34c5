"""Which settings of a resumed run differ from those that it began with, and which of them change the training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from rl_accel.config import leaves
from rl_accel.errors import ConfigError
from rl_accel.feature import features

_MAX_BRACKETS = 100
_MAX_BYTES = 2**22
"""Of config.yaml, which has about 30 KB."""
_FREE = (
    "trainer.total_training_steps",
    "trainer.total_epochs",
    "trainer.logger",
    "trainer.save_freq",
    "trainer.test_freq",
    "trainer.val_before_train",
    "trainer.max_actor_ckpt_to_keep",
    "trainer.max_critic_ckpt_to_keep",
    "trainer.log_val_generations",
    "trainer.project_name",
    "trainer.experiment_name",
    "trainer.rollout_data_dir",
    "trainer.validation_data_dir",
)
"""May change between the sessions of a run; told, not refused."""
_SILENT = (
    "ray_kwargs",
    "trainer.resume_mode",
    "rl_accel.accept_changes",
    "actor_rollout_ref.rollout.custom.rl_accel",  # the same block as `rl_accel`
    "actor_rollout_ref.rollout.trace",
)


def as_yaml(config: DictConfig) -> str:
    """Return a configuration with its references resolved."""
    return OmegaConf.to_yaml(config, resolve=True)


def changes(path: Path, config: DictConfig) -> list[tuple[str, bool]]:
    """Compare a saved configuration with a new one.

    Args:
        path: config.yaml of the run.

    Returns:
        for each setting that differs: `name: old -> new`, and whether it changes the training.

    Raises:
        ConfigError: if the file cannot be read.
    """
    try:
        before = read_config(path)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{path} is damaged ({reason}); remove it to resume without a check of the settings"
        ) from error
    old = _movable(before)
    # Through YAML as well: it writes some numbers so that they are read as text.
    new = _movable(dict(leaves(yaml.load(as_yaml(config), yaml.CSafeLoader))))
    found = []
    for name in [*new, *(name for name in old if name not in new)]:
        if old.get(name) != new.get(name) and not _within(name, _SILENT):
            found.append((f"{name}: {_shown(old, name)} -> {_shown(new, name)}", not _within(name, _free())))
    return found


def read_config(path: Path) -> dict[str, Any]:
    """Read config.yaml as full name -> value.

    Raises:
        OSError, ValueError, RecursionError, yaml.YAMLError: it is not such a file.
    """
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"it has {path.stat().st_size} bytes")
    tree = yaml.load(path.read_bytes(), _Loader)
    if not isinstance(tree, dict):
        raise ValueError("it holds no mapping")
    return dict(leaves(tree))


class _Loader(yaml.SafeLoader):
    """Not the one in C, which follows deep nesting until its stack ends; without aliases, which can stand for more than
    fits into memory, and without many open brackets, each of which makes it look at all the others again."""

    def fetch_flow_collection_start(self, token_class):
        if self.flow_level >= _MAX_BRACKETS:
            raise ValueError(f"more than {_MAX_BRACKETS} brackets are open")
        super().fetch_flow_collection_start(token_class)

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it has aliases")
        return super().compose_node(parent, index)


def _movable(values: dict[str, Any]) -> dict[str, Any]:
    """Settings in which paths in the run folder do not depend on where it stands."""
    run_dir = str(values.get("rl_accel.run_dir") or "\0")
    return {
        name: value.replace(run_dir, "<run_dir>") if isinstance(value, str) else value for name, value in values.items()
    }


def _free() -> tuple[str, ...]:
    """Return the settings of verl and of features that may change between the sessions of a run."""
    ours = (f"rl_accel.{name}.{setting}" for name, found in features().items() for setting in found.free)
    return (*_FREE, *ours)


def _within(name: str, groups: tuple[str, ...]) -> bool:
    return any(name == group or name.startswith(f"{group}.") for group in groups)


def _shown(values: Mapping[str, Any], name: str) -> str:
    return str(values[name]) if name in values else "not set"
