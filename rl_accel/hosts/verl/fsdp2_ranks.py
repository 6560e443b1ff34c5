"""Features on the training ranks of verl's own FSDP2 engine: their settings, and a named patch of `FSDPEngine`, which
does nothing where no feature acts.

Host symbols: `FSDPEngine._build_model_optimizer`, `.train_batch`, `.save_checkpoint`, `.load_checkpoint`,
`.get_per_tensor_param`, `.get_per_tensor_param_shard`, `._is_offload_param`; `load_fsdp_model_to_gpu`,
`offload_fsdp_model_to_cpu`;
`FSDPEngineWithLMHead.forward_step`; the settings class that a node `fsdp_config` names as its `_target_`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from verl.utils.device import get_device_id
from verl.utils.fsdp_utils import load_fsdp_model_to_gpu, offload_fsdp_model_to_cpu
from verl.workers.config import FSDPEngineConfig

from rl_accel.errors import ConfigError
from rl_accel.hosts.verl.export import exported
from rl_accel.hosts.verl.ranks import Ranks
from rl_accel.patching import HostPatch


@dataclass
class FSDP2Config(FSDPEngineConfig):
    """verl's settings and ours."""

    strategy: str = "fsdp2"
    rl_accel: dict[str, Any] = field(default_factory=dict)
    """Feature -> settings of its `Rank`."""


class RanksOnFSDP2(HostPatch):
    """verl's engine has no place to attach to: `_build_model_optimizer` makes module and optimizer and is the last to
    run before training and checkpoints use them."""

    target = "verl.workers.engine.fsdp.transformer_impl:FSDPEngine._build_model_optimizer"
    parameters = ("self",)
    methods = (
        "_build_model_optimizer",
        "train_batch",
        "save_checkpoint",
        "load_checkpoint",
        "get_per_tensor_param",
        "get_per_tensor_param_shard",
    )

    @classmethod
    def replace(cls, module: ModuleType) -> None:
        engine = module.FSDPEngine
        for name in cls.methods:
            setattr(engine, name, getattr(cls, name)(getattr(engine, name)))
        with_head = module.FSDPEngineWithLMHead
        with_head.forward_step = cls.forward_step(with_head.forward_step)

    @staticmethod
    def _build_model_optimizer(original: Callable) -> Callable:
        @functools.wraps(original)
        def build_model_optimizer(self) -> None:
            original(self)
            ranks = Ranks(getattr(self.engine_config, "rl_accel", None))
            if ranks and self.optimizer is not None:
                ranks.attach(self.module, self.optimizer)
                self.fsdp2_ranks = ranks

        return build_model_optimizer

    @staticmethod
    def forward_step(original: Callable) -> Callable:
        @functools.wraps(original)
        def forward_step(self, micro_batch, loss_function, forward_only):
            ranks = getattr(self, "fsdp2_ranks", None)
            if ranks is None or not forward_only:
                return original(self, micro_batch, loss_function, forward_only)
            with ranks.inference(micro_batch):
                return original(self, micro_batch, loss_function, forward_only)

        return forward_step

    @staticmethod
    def train_batch(original: Callable) -> Callable:
        @functools.wraps(original)
        def train_batch(self, data, loss_function):
            ranks = getattr(self, "fsdp2_ranks", None)
            if ranks is None:
                return original(self, data, loss_function)
            ranks.begin_update()
            output = original(self, data, loss_function)
            output["metrics"].update(ranks.metrics())
            return output

        return train_batch

    @staticmethod
    def get_per_tensor_param(original: Callable) -> Callable:
        @functools.wraps(original)
        def get_per_tensor_param(self, *args, **kwargs):
            ranks = getattr(self, "fsdp2_ranks", None)
            held = None if ranks is None else ranks.held_weights()
            if held is None:
                return original(self, *args, **kwargs)
            tensors = _with_parameters_here(self, held)
            return exported(tensors, self.module, self.model_config.hf_config.model_type, get_device_id()), None

        return get_per_tensor_param

    @staticmethod
    def get_per_tensor_param_shard(original: Callable) -> Callable:
        @functools.wraps(original)
        def get_per_tensor_param_shard(self, *args, **kwargs):
            ranks = getattr(self, "fsdp2_ranks", None)
            if ranks is not None and ranks.held_weights() is not None:
                raise ConfigError(
                    "a checkpoint engine that sends shards would send other weights than those that are trained with; "
                    f"{ranks.holder()} keeps its own: turn that off there, or use an engine that sends whole weights"
                )
            return original(self, *args, **kwargs)

        return get_per_tensor_param_shard

    @staticmethod
    def save_checkpoint(original: Callable) -> Callable:
        @functools.wraps(original)
        def save_checkpoint(self, local_path, *args, **kwargs):
            result = original(self, local_path, *args, **kwargs)
            ranks = getattr(self, "fsdp2_ranks", None)
            if ranks is not None and local_path is not None:
                torch.save(ranks.state_dict(), _path(self, local_path))
                torch.distributed.barrier()
            return result

        return save_checkpoint

    @staticmethod
    def load_checkpoint(original: Callable) -> Callable:
        @functools.wraps(original)
        def load_checkpoint(self, local_path, *args, **kwargs):
            ranks = getattr(self, "fsdp2_ranks", None)
            # Read before verl, which may delete the folder afterwards.
            states = {} if ranks is None or local_path is None else _read(self, local_path, ranks)
            result = original(self, local_path, *args, **kwargs)
            if ranks is not None:
                ranks.load_state_dict(states)
            return result

        return load_checkpoint


def _with_parameters_here(engine: Any, tensors: Iterable) -> Iterator:
    """Bring parameters that verl keeps in host memory between phases to the device while `tensors` is read."""
    if engine._is_offload_param:
        load_fsdp_model_to_gpu(engine.module)
    try:
        yield from tensors
    finally:
        if engine._is_offload_param:
            offload_fsdp_model_to_cpu(engine.module)


def _path(engine: Any, local_path: str, what: str = "rl_accel") -> Path:
    return Path(local_path) / f"{what}_world_size_{torch.distributed.get_world_size()}_rank_{engine.rank}.pt"


def _read(engine: Any, local_path: str, ranks: Ranks) -> dict[str, Any]:
    """Return the states in a checkpoint; older ones have a file for every feature."""
    path = _path(engine, local_path)
    if path.is_file():
        return torch.load(path, weights_only=False)
    older = {name: _path(engine, local_path, name) for name in ranks.roles}
    return {name: torch.load(path, weights_only=False) for name, path in older.items() if path.is_file()}
