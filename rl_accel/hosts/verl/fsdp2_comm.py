"""4-bit gradients in verl's own FSDP2 engine: settings, and named patches of `FSDPEngine`, no-ops without settings.

Gradients only. verl keeps shards and sends them to the rollout engines; a copy of the weights that gets differences
(`sharded_weights`) would train another policy than the one that generates.

Host symbols: `FSDPEngine._build_model_optimizer`, `.train_batch`, `.save_checkpoint`, `.load_checkpoint`; the settings
class that a node `fsdp_config` names as its `_target_`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from verl.workers.config import FSDPEngineConfig

from rl_accel.comm import SDP4BitConfig, attach
from rl_accel.config import build
from rl_accel.hosts.verl import deepspeed_comm


@dataclass
class FSDP2CommConfig(FSDPEngineConfig):
    """verl's settings and ours."""

    strategy: str = "fsdp2"
    comm: dict[str, Any] = field(default_factory=dict)
    """Settings of 4-bit communication (`SDP4BitConfig`)."""


class AttachToFSDP2:
    """verl's engine has no place to attach to: `_build_model_optimizer` makes module and optimizer and is the last to
    run before training and checkpoints use them."""

    target = "verl.workers.engine.fsdp.transformer_impl:FSDPEngine._build_model_optimizer"

    @classmethod
    def apply(cls, module: ModuleType) -> None:
        engine = module.FSDPEngine
        for name in ("_build_model_optimizer", "train_batch", "save_checkpoint", "load_checkpoint"):
            setattr(engine, name, getattr(cls, name)(getattr(engine, name)))

    @staticmethod
    def _build_model_optimizer(original: Callable) -> Callable:
        @functools.wraps(original)
        def build_model_optimizer(self) -> None:
            original(self)
            settings = dict(getattr(self.engine_config, "comm", None) or {})
            if settings and self.optimizer is not None:
                self.fsdp2_comm = attach(self.module, build(SDP4BitConfig, settings, "rl_accel.comm"), self.optimizer)

        return build_model_optimizer

    @staticmethod
    def train_batch(original: Callable) -> Callable:
        @functools.wraps(original)
        def train_batch(self, data, loss_function):
            handle = getattr(self, "fsdp2_comm", None)
            if handle is None:
                return original(self, data, loss_function)
            before = handle.stats()
            output = original(self, data, loss_function)
            output["metrics"].update(deepspeed_comm.metrics(before, handle.stats()))
            return output

        return train_batch

    @staticmethod
    def save_checkpoint(original: Callable) -> Callable:
        @functools.wraps(original)
        def save_checkpoint(self, local_path, *args, **kwargs):
            result = original(self, local_path, *args, **kwargs)
            handle = getattr(self, "fsdp2_comm", None)
            if handle is not None and local_path is not None:
                torch.save(handle.state_dict(), _path(self, local_path))
                torch.distributed.barrier()
            return result

        return save_checkpoint

    @staticmethod
    def load_checkpoint(original: Callable) -> Callable:
        @functools.wraps(original)
        def load_checkpoint(self, local_path, *args, **kwargs):
            handle = getattr(self, "fsdp2_comm", None)
            # Read before verl, which may delete the folder afterwards.
            path = None if handle is None or local_path is None else _path(self, local_path)
            state = torch.load(path, weights_only=False) if path is not None and path.is_file() else None
            result = original(self, local_path, *args, **kwargs)
            if handle is not None and state is not None:
                handle.load_state_dict(state)
            return result

        return load_checkpoint


def _path(engine: Any, local_path: str) -> Path:
    return Path(local_path) / f"comm_world_size_{torch.distributed.get_world_size()}_rank_{engine.rank}.pt"
