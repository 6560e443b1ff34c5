"""Which settings of a resumed run differ from those that it began with, and which of them change the training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from rl_accel.errors import ConfigError

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
    "rl_accel.sync",
    "rl_accel.draft.record",
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
        before = yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}); remove it to resume without a check of the settings"
        ) from error
    if not isinstance(before, dict):
        raise ConfigError(f"{path} is damaged (no mapping); remove it to resume without a check of the settings")
    old = _flat(before, _run_dir(before))
    # Through YAML as well: it writes some numbers so that they are read as text.
    now = yaml.load(as_yaml(config), yaml.CSafeLoader)
    new = _flat(now, _run_dir(now))
    found = []
    for name in [*new, *(name for name in old if name not in new)]:
        if old.get(name) != new.get(name) and not _within(name, _SILENT):
            found.append((f"{name}: {_shown(old, name)} -> {_shown(new, name)}", not _within(name, _FREE)))
    return found


def _run_dir(config: Mapping[str, Any]) -> str:
    block = config.get("rl_accel")
    return str(block.get("run_dir")) if isinstance(block, dict) and block.get("run_dir") else "\0"


def _flat(tree: Mapping[Any, Any], run_dir: str, prefix: str = "") -> dict[str, Any]:
    """Settings by full name; paths in the run folder do not depend on where it stands."""
    flat: dict[str, Any] = {}
    for name, value in _leaves(tree, prefix):
        flat[name] = value.replace(run_dir, "<run_dir>") if isinstance(value, str) else value
    return flat


def _leaves(tree: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _within(name: str, groups: tuple[str, ...]) -> bool:
    return any(name == group or name.startswith(f"{group}.") for group in groups)


def _shown(values: Mapping[str, Any], name: str) -> str:
    return str(values[name]) if name in values else "not set"
