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
    vocab_size, extra = policy["vocab_size"], _special_tokens(policy)
    reduced = config.draft_vocab if config.draft_vocab < vocab_size else 0
    while extra and extra[0] < reduced - len(extra):
        extra = extra[1:]  # one of the first anyway
    if reduced and reduced <= len(extra):
        raise ConfigError(
            f"rl_accel.speculator.draft_vocab={reduced} leaves no token but the {len(extra)} special ones of the policy"
        )
    return EagleShape(
        vocab_size=vocab_size,
        hidden_size=hidden,
        layers=aux_layers(policy["num_hidden_layers"]),
        width=width,
        inner=2 * width,
        num_heads=heads,
        num_kv_heads=policy.get("num_key_value_heads") or heads,
        head_dim=policy.get("head_dim") or hidden // heads,
        rope_theta=float(rope.get("rope_theta") or 10000.0),
        max_positions=int(policy.get("max_position_embeddings") or 4096),
        draft_vocab_size=reduced,
        extra_tokens=extra if reduced else (),
    )


def _special_tokens(policy: Mapping[str, Any]) -> tuple[int, ...]:
    """Return what begins and ends texts, in order; tokenizers number those last."""
    found: set[Any] = set()
    for name in ("bos_token_id", "eos_token_id"):
        value = policy.get(name)
        found.update(value if isinstance(value, (list, tuple)) else [value])
    return tuple(sorted(token for token in found if isinstance(token, int) and token < policy["vocab_size"]))


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
