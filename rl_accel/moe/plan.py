"""Bits and ranks of every tensor of a policy, chosen once: shapes in an engine may not change while it runs.

`python -m rl_accel.moe.plan MODEL [setting=value ...]` prints the plan that a run with these settings would have.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from rl_accel.errors import MoEError
from rl_accel.moe import budget, checkpoint, ranks
from rl_accel.moe.budget import TensorPlan
from rl_accel.moe.config import MoEConfig

Plan = Mapping[str, TensorPlan]


def make(settings: MoEConfig, folder: str | Path) -> dict[str, TensorPlan]:
    """Return the plan for a checkpoint on disk.

    Raises:
        MoEError: if it cannot be read, widths or ranks do not fit, or routing counts are missing.
    """
    counts = read_counts(settings.frequencies) if settings.frequencies else {}
    found = checkpoint.tensors(folder, settings.linears)
    if settings.ranks != "budget":
        return {name: of_tensor(settings, name, w_ENK, counts) for name, w_ENK in found}
    curves, num_weights = {}, 0
    for name, w_ENK in found:
        curves[name] = budget.curves(w_ENK, settings.group_size, settings.base, _counts_of(counts, name))
        num_weights += w_ENK.numel()
    return budget.allocate(curves, int(settings.budget_bits * num_weights / 8))


def of_tensor(settings: MoEConfig, name: str, w_ENK: torch.Tensor, counts: Mapping[str, Sequence[float]]) -> TensorPlan:
    """Return the plan of one tensor under every policy but `budget`."""
    max_rank = min(w_ENK.shape[1:])
    if not checkpoint.is_expert(name):
        return TensorPlan(settings.bits, (min(settings.rank_of_linears, max_rank),))
    rank = min(settings.rank, max_rank)
    if settings.ranks == "kurtosis":
        return TensorPlan(settings.bits, tuple(ranks.kurtosis(w_ENK, rank)))
    if settings.ranks == "frequency":
        found = _counts_of(counts, name)
        if found is None:
            raise MoEError(f"{settings.frequencies} has no counts for {name.rpartition('.')[0]}")
        return TensorPlan(settings.bits, tuple(ranks.frequency(found, rank, max_rank)))
    return TensorPlan(settings.bits, tuple(ranks.uniform(len(w_ENK), rank)))


def save(plan: Plan, file: Path) -> None:
    """Write a plan; a reader never sees half of it."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps({name: asdict(tensor) for name, tensor in plan.items()}, indent=1))
    part.replace(file)


def load(file: str | Path) -> dict[str, TensorPlan]:
    """Read a plan.

    Raises:
        MoEError: if the file is not one.
    """
    try:
        found = json.loads(Path(file).read_text())
        return {name: TensorPlan(int(line["bits"]), tuple(line["ranks"])) for name, line in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MoEError(f"{file} is no plan of bits and ranks: {error}") from error


def read_counts(file: str | Path) -> dict[str, list[float]]:
    """Read how often routers chose each expert: {"model.layers.0.mlp.experts": [count, ...]}.

    Raises:
        MoEError: if the file is not that.
    """
    try:
        return {name: [float(count) for count in counts] for name, counts in json.loads(Path(file).read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise MoEError(f"{file} has no routing counts: {error}") from error


def _counts_of(counts: Mapping[str, Sequence[float]], name: str) -> Sequence[float] | None:
    return counts.get(name.rpartition(".")[0])


def main(arguments: Sequence[str]) -> None:
    import yaml

    from rl_accel.config import AccelConfig
    from rl_accel.quickstart.deep import shipped_policy

    if not arguments or arguments[0].startswith("-"):
        sys.exit("usage: python -m rl_accel.moe.plan MODEL [setting=value ...]")
    given = {name: yaml.safe_load(value) for name, value in (part.split("=", 1) for part in arguments[1:])}
    settings = AccelConfig.from_mapping({"moe": given, "allow_lossy": True}).settings["moe"]
    plan = make(settings, shipped_policy(arguments[0]))
    for name, tensor in plan.items():
        mean = sum(tensor.ranks) / len(tensor.ranks)
        print(f"{name:50s} {tensor.bits} bits, rank {mean:.1f} ({min(tensor.ranks)} to {max(tensor.ranks)})")


if __name__ == "__main__":
    main(sys.argv[1:])
