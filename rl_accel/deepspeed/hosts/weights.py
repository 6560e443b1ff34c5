"""Whole weights in and out of a DeepSpeed engine, a tensor at a time.

Host symbols: `deepspeed.runtime.zero.GatheredParameters`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


def fill_from_rank_0(module: nn.Module, device: str | int) -> None:
    """Give ranks whose module was built without storage (device meta) the weights and buffers of rank 0.

    verl loads a checkpoint on rank 0 only unless embeddings are tied. Memory: the whole model on ``device``.
    """
    on_meta = any(parameter.is_meta for parameter in module.parameters())
    anywhere = torch.tensor(int(on_meta), device=device)
    torch.distributed.all_reduce(anywhere)
    if not anywhere.item():
        return
    if on_meta:
        module.to_empty(device=device)
    else:
        module.to(device)
    tensors = [*sorted(module.named_parameters()), *sorted(module.named_buffers())]
    for _, tensor in tensors:
        torch.distributed.broadcast(tensor.data, src=0)


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast weights in place and leave buffers as they are: rotary frequencies stay in float32."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def full_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, whole tensor) for every entry of the module's state dict; a collective call for ZeRO-3.

    Under ZeRO-3 one tensor is gathered at a time and yielded as a copy; otherwise tensors alias the module.
    """
    state = module.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if hasattr(tensor, "ds_id"):
            yield name, _gathered(tensor)
        else:
            yield name, tensor.detach()


def _gathered(parameter: nn.Parameter) -> torch.Tensor:
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().clone()
