"""Checkpoints of the DeepSpeed engine in verl's layout.

`global_step_N/actor/` holds what DeepSpeed writes (folder `zero` with weights and optimizer shards, the tag file
`latest`, the script `zero_to_fp32.py`), `extra_state_world_size_W_rank_R.pt` with learning-rate schedule and random
states as in verl's FSDP checkpoints and the states of features, `huggingface/` with configuration and
tokenizer, and with weights for `hf_model`.
A checkpoint is read by the same number of ranks and the same ZeRO stage that wrote it.

Host symbols: `BaseCheckpointManager`, `DeepSpeedEngine.save_checkpoint`, `.load_checkpoint`.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.dynamic_module_utils import custom_object_save
from verl.utils.checkpoint.checkpoint_manager import BaseCheckpointManager
from verl.utils.fs import local_mkdir_safe
from verl.utils.transformers_compat import drop_tied_target_keys

from rl_accel.deepspeed.hosts.weights import full_tensors
from rl_accel.errors import ConfigError
from rl_accel.hosts.verl.ranks import Ranks

TAG = "zero"
LAYOUT_FILE = "deepspeed.json"


class DeepSpeedCheckpointManager(BaseCheckpointManager):
    """Saves and loads on all ranks together. `model` and `optimizer` of the contents go together."""

    def __init__(
        self,
        ds_engine: Any,
        zero_stage: int,
        lr_scheduler,
        processing_class,
        checkpoint_config,
        ranks: Ranks | None = None,
    ):
        super().__init__(
            ds_engine.module,
            ds_engine.optimizer,
            lr_scheduler=lr_scheduler,
            processing_class=processing_class,
            checkpoint_config=checkpoint_config,
        )
        self.ds_engine = ds_engine
        self.ranks = ranks
        self.layout = {"zero_stage": zero_stage, "world_size": self.world_size}
        if getattr(ds_engine.optimizer, "round_robin_gradients", False):
            self.layout["round_robin_gradients"] = True  # another order of the weights in the shards of states

    def save_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, global_step: int = 0, max_ckpt_to_keep: int | None = None
    ) -> None:
        """Write a checkpoint; older ones beyond ``max_ckpt_to_keep`` go when it is complete."""
        if local_path is None:
            return
        self.previous_global_step = global_step
        if self.rank == 0:
            self.ensure_checkpoint_capacity(max_ckpt_to_keep)
        local_path = local_mkdir_safe(local_path)
        torch.distributed.barrier()
        if self.should_save_model:
            self.ds_engine.save_checkpoint(local_path, tag=TAG)
        if self.should_save_extra:
            schedule = self.lr_scheduler.state_dict() if self.lr_scheduler is not None else None
            extra = {"lr_scheduler": schedule, "rng": self.get_rng_state()}
            extra["rl_accel"] = {} if self.ranks is None else self.ranks.state_dict()
            torch.save(extra, self._extra_path(local_path))
        weights = self._whole_state() if self.should_save_hf_model else None
        if self.rank == 0:
            with open(os.path.join(local_path, LAYOUT_FILE), "w", encoding="utf-8") as file:
                json.dump(self.layout, file)
            self._save_huggingface(os.path.join(local_path, "huggingface"), weights)
        torch.distributed.barrier()
        if self.rank == 0:
            self.register_checkpoint(local_path, max_ckpt_to_keep)

    def load_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, del_local_after_load: bool = False
    ) -> None:
        """Restore weights, optimizer, schedule and random states.

        ``del_local_after_load`` removes nothing: verl deletes what it downloaded, and here nothing is downloaded.

        Raises:
            ConfigError: if the checkpoint is absent, incomplete, or of another number of ranks or ZeRO stage.
        """
        if local_path is None:
            return
        self._check_layout(local_path)
        if self.should_load_model:
            loaded, _ = self.ds_engine.load_checkpoint(local_path, tag=TAG)
            if loaded is None:
                raise ConfigError(f"{local_path}: no complete DeepSpeed checkpoint in folder {TAG!r}")
        if self.should_load_extra:
            extra = torch.load(self._extra_path(local_path), weights_only=False)
            self.load_rng_state(extra["rng"])
            if extra["lr_scheduler"] is not None and self.lr_scheduler is not None:
                self.lr_scheduler.load_state_dict(extra["lr_scheduler"])
            if self.ranks is not None:
                # Older checkpoints have the states of features beside the others.
                self.ranks.load_state_dict(
                    extra.get("rl_accel") or {name: extra.get(name) for name in self.ranks.roles}
                )
        torch.distributed.barrier()

    def _check_layout(self, local_path: str) -> None:
        path = os.path.join(local_path, LAYOUT_FILE)
        if not os.path.isfile(path):
            raise ConfigError(f"{local_path} was not written by strategy=deepspeed: no {LAYOUT_FILE} in it")
        with open(path, encoding="utf-8") as file:
            saved = json.load(file)
        if saved != self.layout:
            raise ConfigError(
                f"{local_path} was written with {saved}, this run has {self.layout}; a checkpoint of the DeepSpeed "
                "engine is read with the same ZeRO stage by the same number of ranks"
            )

    def _extra_path(self, local_path: str) -> str:
        return os.path.join(local_path, f"extra_state_world_size_{self.world_size}_rank_{self.rank}.pt")

    def _whole_state(self) -> dict[str, torch.Tensor] | None:
        """Return all weights in bfloat16 in the memory of rank 0; None on the others."""
        state = {}
        for name, tensor in full_tensors(self.model):
            if self.rank == 0:
                state[name] = (
                    tensor.to("cpu", torch.bfloat16, copy=True) if tensor.is_floating_point() else tensor.cpu()
                )
        return state if self.rank == 0 else None

    def _save_huggingface(self, path: str, weights: dict[str, torch.Tensor] | None) -> None:
        local_mkdir_safe(path)
        config = self.model.config
        if getattr(config, "auto_map", None):
            config.auto_map = {key: value for key, value in config.auto_map.items() if key is not None}
            custom_object_save(self.model, path, config=config)
        config.save_pretrained(path)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(path)
        source = getattr(config, "name_or_path", "")
        if self.model.can_generate() and os.path.isfile(os.path.join(source, "generation_config.json")):
            GenerationConfig.from_pretrained(source).save_pretrained(path)
        if weights is not None:
            drop_tied_target_keys(weights, self.model, config)
            self.model.save_pretrained(path, state_dict=weights)
