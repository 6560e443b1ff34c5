"""The quickstart policy with more layers that change nothing: the same tokens, and a step several times as expensive.

A new layer adds zero to the residual stream, since its last projections are zero; the old layers keep their order and
are spread evenly between new ones. A draft head is then as cheap beside a step as it is on a GPU. Training moves the
new layers like any others.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

POLICY = Path(__file__).parent / "policy"
MOE_POLICY = Path(__file__).parent / "moe_policy"
SHIPPED = {"quickstart": POLICY, "quickstart_moe": MOE_POLICY}
"""Names that stand for a policy of the package."""
LAYERS = 24
LAST_PROJECTIONS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def shipped_policy(path: str) -> str:
    """Return the folder of `quickstart`, `quickstart_moe` and `quickstart_deep`, any other path as it is."""
    return str(deep_policy()) if path == "quickstart_deep" else str(SHIPPED.get(path, path))


def deep_policy(layers: int = LAYERS) -> Path:
    """Return the folder of the grown policy, made on first use in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rl_accel"
    folder = cache / f"quickstart-{layers}-{(POLICY / 'model.safetensors').stat().st_size}"
    if not (folder / "config.json").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as made:
            grow(POLICY, Path(made) / "policy", layers)
            try:
                os.replace(Path(made) / "policy", folder)
            except OSError:  # another process was first
                if not (folder / "config.json").is_file():
                    raise
    return folder


def grow(source: Path, target: Path, layers: int, seed: int = 0) -> None:
    """Write a policy of `layers` layers that computes what `source` does.

    Raises:
        ValueError: if `source` has more layers than that.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    old = AutoModelForCausalLM.from_pretrained(source)
    config = AutoConfig.from_pretrained(source)
    before = config.num_hidden_layers
    if layers < before:
        raise ValueError(f"{source} has {before} layers already; asked for {layers}")
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[0]] * layers
    torch.manual_seed(seed)
    new = AutoModelForCausalLM.from_config(config, dtype=old.dtype)
    weights = old.state_dict()
    where = {(i + 1) * layers // before - 1: i for i in range(before)}
    grown = {name: value for name, value in weights.items() if ".layers." not in name}
    for name, value in new.state_dict().items():
        if ".layers." in name:
            prefix, rest = name.split(".layers.")
            number, _, part = rest.partition(".")
            if int(number) in where:
                value = weights[f"{prefix}.layers.{where[int(number)]}.{part}"]
            elif part in LAST_PROJECTIONS:
                value = torch.zeros_like(value)
            grown[name] = value
    new.load_state_dict(grown)
    new.save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (source / name).is_file():
            shutil.copy(source / name, target / name)
