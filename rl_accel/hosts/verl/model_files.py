"""What a configuration's model says of itself, read from its files without importing transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rl_accel.errors import ConfigError
from rl_accel.quickstart.deep import SHIPPED


def is_local(model: str) -> bool:
    """Whether a model is named by a folder. A hub name is `name` or `owner/name`, and an URL is neither."""
    if "://" in model:
        return False
    return model.startswith(("/", ".", "~")) or model.count("/") > 1


def max_position_embeddings(config: DictConfig) -> int | None:
    """Return the positions of the policy in tokens, or None where its files are not on this machine.

    Raises:
        ConfigError: if its config.json is damaged.
    """
    found = policy_config(config)
    text = text_config(found)
    length = text.get("max_position_embeddings", found.get("max_position_embeddings"))
    return length if isinstance(length, int) and length > 0 else None


def policy_config(config: DictConfig) -> dict[str, Any]:
    """Return config.json of the policy with the user's changes, {} where it is not on this machine.

    Raises:
        ConfigError: if it is damaged.
    """
    model = config.actor_rollout_ref.model
    return {**read(str(model.get("hf_config_path") or model.path)), **(model.get("override_config") or {})}


def text_config(found: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a config.json that describes the text model."""
    nested = found.get("text_config")
    return nested if isinstance(nested, dict) else found


def read(model: str) -> dict[str, Any]:
    """Return config.json of a model, named by folder, of the package or on the hub; {} where it is not on this machine.

    Raises:
        ConfigError: if it is damaged.
    """
    own = SHIPPED.get(model, Path(model).expanduser()) / "config.json"
    path = own if own.is_file() else _cached(model)
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    return found if isinstance(found, dict) else {}


def _cached(model: str) -> Path | None:
    """The config.json of a hub model that was downloaded before."""
    if is_local(model) or "://" in model:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json")
    except HFValidationError as error:
        raise ConfigError(
            f"actor_rollout_ref.model.path={model}: neither a folder nor the name of a model: {error}"
        ) from error
    return Path(found) if isinstance(found, str) else None
