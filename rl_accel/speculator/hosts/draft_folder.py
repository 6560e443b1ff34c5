"""The folder that vLLM loads an EAGLE-3 draft from when an engine starts, and what vLLM is told of it.

Its weights are random ones: the engine puts those of the trainer in their place before the first request. vLLM only has
to find a draft of the right shape, with embeddings and LM head that are not the policy's, because equal or missing ones
it would share.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rl_accel.errors import ConfigError, NotLiveError
from rl_accel.speculator import export
from rl_accel.speculator.config import SpeculatorConfig
from rl_accel.speculator.eagle import EagleShape, first_weights
from rl_accel.speculator.traces import aux_layers

MAX_WIDTH = 512
NUM_DRAFT_TOKENS = 3
"""Where none is set."""
NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


def shape_for(policy: Mapping[str, Any], config: SpeculatorConfig) -> EagleShape:
    """Return the shape of a head for a policy.

    Args:
        policy: its config.json, of the text model where that is nested.

    Raises:
        ConfigError: if that does not say what is needed.
    """
    missing = [name for name in NEEDED if not isinstance(policy.get(name), int)]
    if missing:
        raise ConfigError(
            "rl_accel.speculator.head=eagle3 needs the policy's config.json on this machine, with "
            f"{', '.join(NEEDED)}; {', '.join(missing)} cannot be read. Name a folder as model, or download it first"
        )
    hidden, heads = policy["hidden_size"], policy["num_attention_heads"]
    width = config.width or min(hidden, MAX_WIDTH)
    rope = {**policy, **(policy.get("rope_parameters") or {})}
    return EagleShape(
        vocab_size=policy["vocab_size"],
        hidden_size=hidden,
        layers=aux_layers(policy["num_hidden_layers"]),
        width=width,
        inner=2 * width,
        num_heads=heads,
        num_kv_heads=policy.get("num_key_value_heads") or heads,
        head_dim=policy.get("head_dim") or hidden // heads,
        rope_theta=float(rope.get("rope_theta") or 10000.0),
        max_positions=int(policy.get("max_position_embeddings") or 4096),
    )


def speculative_config(folder: Path, shape: EagleShape, seed: int, num_draft_tokens: int | None) -> dict[str, Any]:
    """Write the folder; return vLLM's `speculative_config`.

    Raises:
        ConfigError: if it cannot be written.
    """
    try:
        export.write(folder, shape, first_weights(shape, seed))
    except OSError as error:
        raise ConfigError(f"{folder}: the folder of the EAGLE-3 draft cannot be written: {error}") from error
    return {
        "method": "eagle3",
        "model": str(folder),
        "num_speculative_tokens": num_draft_tokens or NUM_DRAFT_TOKENS,
        "disable_padded_drafter_batch": True,  # drafting comes after what was accepted is known, as traces need it
        "draft_load_config": {"load_format": "safetensors"},  # the policy's may be `dummy`
    }


def read_shape(folder: str) -> EagleShape:
    """Return the shape of the draft in a folder.

    Raises:
        NotLiveError: if it was not written here.
    """
    path = Path(folder) / export.CONFIG
    try:
        return export.shape_of_config(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotLiveError(f"{path}: no draft of rl_accel.speculator: {type(error).__name__}: {error}") from error
