"""Weights of a training engine on their way to rollout engines, under the names that these read.

Host symbols: `convert_weight_keys` and `unfuse_moe_params` of verl.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn


def exported(
    tensors: Iterable[tuple[str, torch.Tensor]], module: nn.Module, model_type: str, device: str | int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name as in a checkpoint, whole tensor on ``device``).

    Args:
        tensors: (name in the module's state dict, whole tensor).
    """
    from verl.utils.model import convert_weight_keys
    from verl.workers.engine.fsdp.utils import unfuse_moe_params

    names = convert_weight_keys({name: name for name in module.state_dict()}, module)
    outer = {inner: name for name, inner in names.items()}
    renamed = ((outer[name], tensor.to(device, non_blocking=True)) for name, tensor in tensors)
    return unfuse_moe_params(renamed, model_type)
