"""A trained EAGLE-3 head as a plain folder of Hugging Face files, which vLLM serves by itself.

    python -m rl_accel.speculator.export CHECKPOINT FOLDER
    vllm serve POLICY --speculative-config '{"method": "eagle3", "model": "FOLDER", "num_speculative_tokens": 3}'

CHECKPOINT is a file of a checkpoint of verl, `global_step_N/rl_accel/speculator/engine000.pt`, or of a server's state;
what is written is the head that was served. FOLDER gets config.json and model.safetensors in the names of EAGLE-3's
published drafts. Its norms of the policy's states are `fc_norm` there, which vLLM 0.28.0 knows; a server that does
not, drafts badly, and no less correctly.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rl_accel.errors import ConfigError
from rl_accel.speculator.eagle import EagleShape
from rl_accel.speculator.flat import EPS
from rl_accel.speculator.kinds import kind_of, shape_of

CONFIG, WEIGHTS = "config.json", "model.safetensors"
NAMES = {
    "fc": "fc",
    "embed": "embed_tokens",
    "embed_norm": "midlayer.input_layernorm",
    "state_norm": "midlayer.hidden_norm",
    "q": "midlayer.self_attn.q_proj",
    "k": "midlayer.self_attn.k_proj",
    "v": "midlayer.self_attn.v_proj",
    "o": "midlayer.self_attn.o_proj",
    "mlp_norm": "midlayer.post_attention_layernorm",
    "gate": "midlayer.mlp.gate_proj",
    "up": "midlayer.mlp.up_proj",
    "down": "midlayer.mlp.down_proj",
    "final_norm": "norm",
    "lm_head": "lm_head",
}
"""Weight -> module of the draft; `aux_norm` has a module per layer."""


def main(argv: list[str]) -> int:
    """Export; returns the exit status."""
    if len(argv) != 2 or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    try:
        shape, flat = read(Path(argv[0]))
        write(Path(argv[1]), shape, flat)
    except (ConfigError, OSError) as error:
        print(f"rl_accel: {error}", file=sys.stderr)
        return 1
    return 0


def read(path: Path) -> tuple[EagleShape, torch.Tensor]:
    """Return the head that a trainer's file says was served.

    Raises:
        ConfigError: if the file is not there, damaged, or holds a head of another kind.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; it is named engineNNN.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        shape, flat = shape_of(state["shape"]), state["served"]
        whole = flat.shape == (shape.num_weights,) and bool(torch.isfinite(flat).all())
    except Exception as error:  # whatever a damaged file makes of itself
        first = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"{path} is no file of a head, or damaged: {type(error).__name__}: {first}") from error
    if not isinstance(shape, EagleShape):
        raise ConfigError(
            f"{path} holds a {kind_of(shape).name} head, which no other server knows; one of "
            "rl_accel.speculator.head=eagle3 can be exported"
        )
    if not whole:
        raise ConfigError(f"{path} is damaged: its weights are not finite, or not as many as its shape says")
    return shape, flat


def write(folder: Path, shape: EagleShape, flat: torch.Tensor) -> None:
    """Write the folder; files that are there are replaced, each as a whole.

    Args:
        flat: float32 [num_weights].

    Raises:
        OSError: if it cannot be written.
    """
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / CONFIG, json.dumps(config(shape), indent=2).encode() + b"\n")
    _replace(folder / WEIGHTS, save(tensors(shape, flat), metadata={"format": "pt"}))


def tensors(shape: EagleShape, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return name -> float32 tensor, as views of `flat`.

    With a reduced vocabulary also `d2t`, int64, how far a token's id is from its row of the LM head, and `t2d`, bool,
    which tokens can be drafted.
    """
    weights = shape.split(flat)
    found = {f"fc_norm.{i}.weight": norm for i, norm in enumerate(weights.pop("aux_norm"))}
    found |= {f"{NAMES[name]}.weight": weight for name, weight in weights.items()}
    ids = shape.draft_ids()
    if ids is not None:
        found["d2t"] = ids - torch.arange(len(ids))
        found["t2d"] = torch.zeros(shape.vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
    return found


def config(shape: EagleShape) -> dict[str, Any]:
    """Return config.json."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": shape.width,
        "target_hidden_size": shape.hidden_size,
        "intermediate_size": shape.inner,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "draft_vocab_size": shape.num_drafted,
        "draft_extra_token_ids": list(shape.extra_tokens),
        "max_position_embeddings": shape.max_positions,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": EPS,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "fc_norm": True,
        "num_aux_hidden_states": len(shape.layers),
        "eagle_aux_hidden_state_layer_ids": list(shape.layers),
        "dtype": "float32",
    }


def shape_of_config(values: Mapping[str, Any]) -> EagleShape:
    """Return what `config` was made of; KeyError for a config of another maker."""
    return EagleShape(
        vocab_size=values["vocab_size"],
        hidden_size=values["target_hidden_size"],
        layers=tuple(values["eagle_aux_hidden_state_layer_ids"]),
        width=values["hidden_size"],
        inner=values["intermediate_size"],
        num_heads=values["num_attention_heads"],
        num_kv_heads=values["num_key_value_heads"],
        head_dim=values["head_dim"],
        rope_theta=values["rope_theta"],
        max_positions=values["max_position_embeddings"],
        draft_vocab_size=values["draft_vocab_size"] if values["draft_vocab_size"] != values["vocab_size"] else 0,
        extra_tokens=tuple(values["draft_extra_token_ids"]),
    )


def _replace(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
