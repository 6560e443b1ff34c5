"""Experts and linear layers of a checkpoint on disk, stacked and named as vLLM holds them.

Names: `<layer>.mlp.experts.w13` and `.w2` for experts (gate above up), the fused `qkv_proj` and `gate_up_proj` for
linear layers. Routers, gates of shared experts, embeddings and LM heads are left out: they are never quantized. One
tensor is in memory at a time. Reads safetensors, as per-expert matrices (`experts.N.gate_proj`, Mixtral's
`experts.N.w1`) or stacked (`experts.gate_up_proj`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rl_accel.errors import MoEError

EXPERT = re.compile(
    r"^(?P<prefix>.*\.experts)\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$"
)
STACKED = re.compile(r"^(?P<prefix>.*\.experts)\.(?P<part>gate_up_proj|down_proj)$")
LINEAR = re.compile(r"^(?P<prefix>.*)\.(?P<part>[a-z]+_proj)\.weight$")
FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
ORDER = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "w1", "w3")
TENSOR_OF_PART = {"gate_proj": "w13", "up_proj": "w13", "w1": "w13", "w3": "w13", "down_proj": "w2", "w2": "w2"}
STACKED_PARTS = {"gate_up_proj": "w13", "down_proj": "w2"}


def tensors(folder: str | Path, linears: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and weights, float32 [E, N, K], of all experts, and of linear layers (E = 1) if asked for.

    Raises:
        MoEError: if the folder has no safetensors, or no experts and linear layers were not asked for.
    """
    where = _open(folder)
    groups = _group(where, linears)
    if not groups:
        raise MoEError(f"{folder} has no experts" + (" or linear layers" if linears else ""))
    for name in sorted(groups, key=_natural):
        yield name, _stack(where, groups[name])


def expert_layers(folder: str | Path) -> list[str]:
    """Return the names of layers of experts, in order, such as `model.layers.0.mlp.experts`.

    Raises:
        MoEError: if the folder has no safetensors, or no experts.
    """
    found = {name.rpartition(".")[0] for name in _group(_open(folder), linears=False)}
    if not found:
        raise MoEError(f"{folder} has no experts")
    return sorted(found, key=_natural)


def is_expert(name: str) -> bool:
    """Whether a name of `tensors` is one of experts."""
    return name.endswith((".experts.w13", ".experts.w2"))


def _open(folder: str | Path) -> dict[str, Any]:
    """Return tensor -> the open file that has it."""
    from safetensors import safe_open

    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise MoEError(f"{folder} has no *.safetensors to read experts from")
    opened = [safe_open(str(file), "pt") for file in files]
    return {name: file for file in opened for name in file.keys()}  # noqa: SIM118


def _group(names: Any, linears: bool) -> dict[str, list[tuple[int, int, str]]]:
    """Return tensor -> (expert, or -1 if stacked; position among its parts; name in the file)."""
    groups: dict[str, list[tuple[int, int, str]]] = {}
    for name in names:
        if found := EXPERT.match(name):
            part = found["part"]
            entry = (int(found["expert"]), ORDER.index(part) if part in ORDER else 0, name)
            groups.setdefault(f"{found['prefix']}.{TENSOR_OF_PART[part]}", []).append(entry)
        elif found := STACKED.match(name):
            groups.setdefault(f"{found['prefix']}.{STACKED_PARTS[found['part']]}", []).append((-1, 0, name))
        elif linears and (found := LINEAR.match(name)):
            part = found["part"]
            entry = (0, ORDER.index(part) if part in ORDER else 0, name)
            groups.setdefault(f"{found['prefix']}.{FUSED.get(part, part)}", []).append(entry)
    return groups


def _stack(where: dict[str, Any], entries: list[tuple[int, int, str]]) -> torch.Tensor:
    entries = sorted(entries)
    if entries[0][0] < 0:
        return where[entries[0][2]].get_tensor(entries[0][2]).float().contiguous()
    matrices: dict[int, list[torch.Tensor]] = {}
    for expert, _, name in entries:
        matrices.setdefault(expert, []).append(where[name].get_tensor(name).float())
    return torch.stack([torch.cat(parts) for _, parts in sorted(matrices.items())]).contiguous()


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
