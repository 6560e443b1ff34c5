"""The weight gathers of ZeRO-3, by secondary shards (rl_accel/comm/sharded.py).

DeepSpeed fetches parameters where modules need them, with the method `all_gather_coalesced` that it puts on every
parameter, or with `all_gather` where a module reads one of another module. In their place the first fetch after an
optimizer step brings 4-bit differences from the other nodes, all parameters of the fetch in one exchange, and every
fetch gathers inside the node. On an accelerator DeepSpeed calls it in its own stream, ahead of need; on a CPU it is
over when it returns.

Parameters that ZeRO-3 keeps whole on every rank (`stage3_param_persistence_threshold`) and `GatheredParameters` stay
DeepSpeed's own: the first are few weights, the second reads and writes the optimizer's. Memory: P/L weights a rank.

Host symbols: `all_gather_coalesced`, `all_gather`, `ds_id`, `ds_tensor`, `ds_numel`, `ds_shape`, `ds_persist`,
`ds_status`, `ds_process_group` of a parameter; `optimizer.step`, `.fp32_partitioned_groups_flat`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from rl_accel.comm.handle import CommHandle
from rl_accel.comm.hosts.deepspeed.checks import undecorated
from rl_accel.comm.secondary import Unit
from rl_accel.comm.sharded import ShardedWeights
from rl_accel.errors import CommError, VersionError

FETCH = ("params", "safe_mode", "quantize")
"""Parameters of `all_gather_coalesced` as it was read."""


def attach(module: torch.nn.Module, optimizer: Any, handle: CommHandle) -> None:
    """Send weight differences in the fetches of `module`, and count the optimizer's steps.

    Raises:
        CommError: for parameters that cannot be served.
        VersionError: if DeepSpeed fetches them by another function than the one that was read.
    """
    step = optimizer.step
    if not handle.config.weights:

        @functools.wraps(step)
        def counting(self, closure=None):
            result = step(closure)
            handle.end_step()
            return result

        handle.replace(optimizer, "step", counting)
        return

    fetches = _Fetches(module, optimizer, handle)

    @functools.wraps(step)
    def stepping(self, closure=None):
        fetches.weights.before_step()
        result = step(closure)
        fetches.weights.after_step()
        return result

    handle.replace(optimizer, "step", stepping)
    hook = module.register_forward_pre_hook(fetches.weights.before_forward, prepend=True)
    handle.on_detach(hook.remove)
    fetches.weights.register()
    handle.register_whole_weights(fetches.whole_weights)


def has_shards(module: torch.nn.Module) -> bool:
    """Whether ZeRO-3 does not keep all parameters whole."""
    return any(not parameter.ds_persist for parameter in _parameters(module))


def _parameters(module: torch.nn.Module) -> list[Any]:
    """Those that ZeRO-3 shards or keeps."""
    return [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]


class _Fetches:
    """The fetches of one model's sharded parameters."""

    def __init__(self, module: torch.nn.Module, optimizer: Any, handle: CommHandle):
        self.module, self.handle = module, handle
        parameters = _parameters(module)
        served = sorted((p for p in parameters if not p.ds_persist), key=lambda parameter: parameter.ds_id)
        _check(served, handle)
        self.weights = ShardedWeights(
            handle,
            lambda: [parameter.ds_tensor for parameter in parameters],
            lambda: optimizer.fp32_partitioned_groups_flat,
        )
        self.units: dict[int, Unit] = {p.ds_id: self.weights.add_unit(changes=p.requires_grad) for p in served}
        """By `ds_id`."""
        self._plain: dict[int, Callable[..., Any]] = {}
        for parameter in parameters:
            self._plain[parameter.ds_id] = parameter.all_gather_coalesced
            handle.replace(parameter, "all_gather_coalesced", self._fetch)
        for parameter in served:
            handle.replace(parameter, "all_gather", self._fetch_one(parameter.all_gather))

    def _fetch(self, _: Any, params: Iterable[Any], safe_mode: bool = False, quantize: bool = False) -> _Handles:
        """Stands for `all_gather_coalesced` of every parameter."""
        params = sorted(params, key=lambda parameter: parameter.ds_id)
        others = [parameter for parameter in params if parameter.ds_id not in self.units]
        handles = []
        if others:
            plain = self._plain[others[0].ds_id]
            handles.append(plain(others, safe_mode=safe_mode, quantize=quantize))
        ours = [parameter for parameter in params if parameter.ds_id in self.units]
        if ours:
            handles.append(self._gather(ours))
        return _Handles(handles)

    def _fetch_one(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """Stands for `all_gather` of a parameter: without a list a forward pass asks, with one `GatheredParameters`."""

        @functools.wraps(plain)
        def all_gather(parameter, param_list=None, async_op=False, hierarchy=0):
            if param_list is not None or async_op:
                return plain(param_list, async_op=async_op, hierarchy=hierarchy)
            if parameter.ds_status is type(parameter.ds_status).NOT_AVAILABLE:
                self._gather([parameter]).wait()
            return None

        return all_gather

    def _gather(self, params: list[Any]) -> _Fetched:
        for parameter in params:
            status = type(parameter.ds_status)
            if parameter.ds_status is not status.NOT_AVAILABLE:
                raise RuntimeError(parameter.ds_summary())
            parameter.ds_status = status.INFLIGHT
        shards = [parameter.ds_tensor for parameter in params]
        world_size = self.handle.topology.world_size
        wholes = [shard.new_empty(world_size, shard.numel()) for shard in shards]
        self.weights.gather([self.units[parameter.ds_id] for parameter in params], shards, wholes)
        return _Fetched(params, wholes)

    @torch.no_grad()
    def whole_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, copy) of every entry of the state dict as forward passes see it."""
        from deepspeed.runtime.zero import GatheredParameters

        self.weights.before_forward()
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            if not hasattr(tensor, "ds_id"):
                yield name, tensor.detach()
            elif tensor.ds_id not in self.units or tensor.ds_status is type(tensor.ds_status).AVAILABLE:
                with GatheredParameters([tensor]):
                    yield name, tensor.detach().clone()
            else:
                tensor.all_gather()
                whole = tensor.detach().clone()
                tensor.partition()
                yield name, whole


def _check(parameters: list[Any], handle: CommHandle) -> None:
    if not parameters:
        raise CommError(
            "comm.sharded_weights at ZeRO-3 finds no sharded parameters: all are smaller than "
            "stage3_param_persistence_threshold"
        )
    found = tuple(inspect.signature(undecorated(parameters[0].all_gather_coalesced)).parameters)
    if found != FETCH:
        raise VersionError(f"the installed DeepSpeed fetches ZeRO-3 parameters by ({', '.join(found)}), not by {FETCH}")
    if len({parameter.ds_tensor.dtype for parameter in parameters}) > 1:
        raise CommError("comm.sharded_weights does not cover ZeRO-3 parameters of several dtypes")
    if any(hasattr(parameter, "comm_dtype") for parameter in parameters):
        raise CommError("comm.sharded_weights does not cover torch_autocast, which gathers in another dtype")
    ranks = dist.get_process_group_ranks(handle.topology.group)
    if any(dist.get_process_group_ranks(parameter.ds_process_group) != ranks for parameter in parameters):
        raise CommError("comm.sharded_weights does not cover parameters that are sharded over different ranks")


class _Fetched:
    """Parameters that were gathered, as DeepSpeed's `AllGatherCoalescedHandle`."""

    def __init__(self, params: list[Any], wholes: list[torch.Tensor]):
        self._pending = [*zip(params, wholes, strict=True)]

    def wait(self, handle_dependency: bool = True) -> None:
        for parameter, whole in self._pending:
            parameter.data = whole.view(-1)[: parameter.ds_numel].view(parameter.ds_shape)
            parameter.ds_status = type(parameter.ds_status).AVAILABLE
        self._pending = []


class _Handles:
    def __init__(self, handles: list[Any]):
        self._handles = handles

    def wait(self, handle_dependency: bool = True) -> None:
        for handle in self._handles:
            handle.wait(handle_dependency=handle_dependency)
