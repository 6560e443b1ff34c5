"""Compressed tensors in a safetensors file: codes, scales and compensators as an engine holds them.

Per tensor `<name>|<part>`; widths and the version of the weights stand in the metadata. Source: ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from rl_accel.errors import MoEError
from rl_accel.kernels.moe_int3.layout import Factors, QuantizedMatrix
from rl_accel.moe.compress import Compressed

FORMAT = "rl_accel.moe/1"
CODES, FACTORS = ("codes", "scales", "offsets"), tuple(field.name for field in fields(Factors))
STATE = ("errors_E", "alternations_E")


def save(tensors: Mapping[str, Compressed], file: Path, version: int) -> None:
    """Write tensors; a reader never sees half of a file."""
    from safetensors.torch import save_file

    parts: dict[str, Any] = {}
    widths = {}
    for name, tensor in tensors.items():
        matrix = tensor.matrix
        widths[name] = {key: getattr(matrix, key) for key in ("bits", "group_size", "in_features")}
        for owner, names in ((matrix, CODES), (tensor.factors, FACTORS), (tensor, STATE)):
            if owner is not None:
                parts |= {f"{name}|{part}": getattr(owner, part).contiguous() for part in names}
    metadata = {"format": FORMAT, "version": str(version), "widths": json.dumps(widths)}
    part_file = file.with_suffix(".part")
    save_file(parts, part_file, metadata)
    part_file.replace(file)


def load(file: Path) -> dict[str, Compressed]:
    """Read them.

    Raises:
        MoEError: if the file is damaged or not of this format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), "pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise MoEError(f"{file} is of format {metadata.get('format')!r}; expected {FORMAT!r}")
            parts = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            widths = json.loads(metadata["widths"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise MoEError(f"{file} holds no compressed experts: {error}") from error
    return {name: _tensor(parts, name, width, file) for name, width in widths.items()}


def version(file: Path) -> int:
    """Return how many sets of weights had come when it was written."""
    from safetensors import safe_open

    with safe_open(str(file), "pt") as opened:
        return int(opened.metadata()["version"])


def _tensor(parts: Mapping[str, Any], name: str, width: Mapping[str, int], file: Path) -> Compressed:
    try:
        matrix = QuantizedMatrix(*(parts[f"{name}|{part}"] for part in CODES), **width)
        factors = Factors(**{p: parts[f"{name}|{p}"] for p in FACTORS}) if f"{name}|starts" in parts else None
        state = [parts[f"{name}|{part}"] for part in STATE]
    except KeyError as error:
        raise MoEError(f"{file} lacks {error} of {name}") from None
    matrix.check_integrity()
    if factors is not None:
        factors.check_integrity(matrix)
    return Compressed(matrix, factors, *state)
