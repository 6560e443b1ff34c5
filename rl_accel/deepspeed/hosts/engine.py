"""Training engines for `strategy=deepspeed`: verl's FSDP engines on DeepSpeed's ZeRO 1, 2 and 3.

Data, losses, batching and learning-rate schedule are verl's. What is replaced is what FSDP did: sharding, gradient
reduction and accumulation, clipping, the update, moving states between devices, checkpoints and the export of weights.
Not covered: LoRA, QAT, Ulysses sequence parallelism, activation offload, float16 (`checks.py` refuses them).

verl decides the number of micro-batches at run time, so each one tells DeepSpeed whether it is the last of its batch.

Host symbols: `FSDPEngine._gradient_sync_context`, `._build_module`, `._build_optimizer`, `._build_lr_scheduler`,
`.forward_step`; `DeepSpeedEngine.set_gradient_accumulation_boundary`, `.backward`, `.step`, `.get_global_grad_norm`,
`.offload_states`, `.reload_states`; `averaged_gradients`, `all_grad_tensors` of DeepSpeed's ZeRO-1/2 optimizer.
"""

from __future__ import annotations

import logging
import math
from contextlib import contextmanager, nullcontext
from inspect import signature
from typing import Any

import torch
from verl.utils.device import get_device_id, get_device_name
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead, FSDPEngineWithValueHead

from rl_accel.deepspeed.hosts import weights
from rl_accel.deepspeed.hosts.checks import check_engine
from rl_accel.deepspeed.hosts.engine_config import make_ds_config, param_dtype, zero_stage
from rl_accel.errors import ConfigError
from rl_accel.hosts.deepspeed import load
from rl_accel.hosts.verl.export import exported
from rl_accel.hosts.verl.ranks import Ranks

logger = logging.getLogger(__name__)


class _EngineLoss:
    """What verl calls `backward()` on: DeepSpeed reduces gradients in its engine's `backward`."""

    def __init__(self, ds_engine: Any, loss: torch.Tensor):
        self.ds_engine = ds_engine
        self.loss = loss

    def backward(self) -> None:
        self.ds_engine.backward(self.loss, scale_wrt_gas=False)


class DeepSpeedMixin:
    """Overrides the FSDP-specific half of `FSDPEngine`. `ds_engine` is the DeepSpeed engine, or None."""

    ds_engine: Any = None
    """None for a forward-only engine below ZeRO-3, which is a plain module on every rank."""
    # verl's, of the class that this is mixed into
    model_config: Any
    engine_config: Any
    optimizer_config: Any
    checkpoint_config: Any
    _build_module: Any
    _build_optimizer: Any
    _build_lr_scheduler: Any
    _is_offload_param: bool
    _is_offload_optimizer: bool
    checkpoint_manager: Any

    ranks: Ranks | None = None
    """Features that act on this rank; None where there is no optimizer."""

    def __init__(self, model_config, engine_config, optimizer_config, checkpoint_config, **kwargs):
        check_engine(model_config, engine_config, optimizer_config, checkpoint_config)
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config, **kwargs)
        self.zero_stage = zero_stage(engine_config)
        self._autocast_dtype = param_dtype(engine_config)
        self._has_unused_gradients = False

    def initialize(self) -> None:
        from rl_accel.deepspeed.hosts.checkpoint import DeepSpeedCheckpointManager

        self._build_model_optimizer()
        self.checkpoint_manager = None
        if self.optimizer is not None:
            self.checkpoint_manager = DeepSpeedCheckpointManager(
                self.ds_engine,
                self.zero_stage,
                self.lr_scheduler,
                self.model_config.get_processor(),
                self.checkpoint_config,
                self.ranks,
            )
        self.to("cpu", model=self._is_offload_param, optimizer=self._is_offload_optimizer, grad=self._is_offload_param)

    def _build_model_optimizer(self) -> None:
        module = self._build_module()
        self.pass_packed_cu_seqlens = "cu_seqlens" in signature(module.forward).parameters
        weights.fill_from_rank_0(module, get_device_id())
        self.optimizer = None
        self.lr_scheduler = None
        if self.engine_config.forward_only and self.zero_stage < 3:
            self.module = weights.cast_parameters(module, self._autocast_dtype).to(get_device_id())
            return
        if not self.engine_config.forward_only:
            self.optimizer = self._build_optimizer(module)
        self.ds_engine = self._start_deepspeed(module)
        self.module = self.ds_engine
        if self.optimizer is not None:
            self.ranks = Ranks(getattr(self.engine_config, "rl_accel", None))
            self.ranks.attach(self.ds_engine, None)
            self.lr_scheduler = self._build_lr_scheduler(self.optimizer)

    def _start_deepspeed(self, module: torch.nn.Module) -> Any:
        deepspeed = load(get_device_name())
        clip_grad = None if self.optimizer is None else self.optimizer_config.clip_grad
        numel = sum(parameter.numel() for parameter in module.parameters())
        self.ds_config = make_ds_config(self.engine_config, numel, get_device_name(), clip_grad)
        ds_engine, *_ = deepspeed.initialize(model=module, optimizer=self.optimizer, config=self.ds_config)
        return ds_engine

    def forward_step(self, micro_batch, loss_function, forward_only):
        ranks = self.ranks if forward_only else None
        with ranks.inference(micro_batch) if ranks is not None else nullcontext():
            loss, output = super().forward_step(micro_batch, loss_function, forward_only)
        return (loss if forward_only else _EngineLoss(self.ds_engine, loss)), output

    @contextmanager
    def _gradient_sync_context(self, *, is_last_micro_batch: bool):
        self.ds_engine.set_gradient_accumulation_boundary(is_last_micro_batch)
        self._has_unused_gradients = True
        yield

    def optimizer_zero_grad(self) -> None:
        """Drop gradients, also those of micro-batches that no update followed."""
        optimizer = self.ds_engine.optimizer
        optimizer.zero_grad(set_to_none=True)
        if self._has_unused_gradients and self.zero_stage < 3:
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = None
            for group in optimizer.all_grad_tensors:
                optimizer.all_grad_tensors[group] = None
        self._has_unused_gradients = False

    def optimizer_step(self) -> float:
        """Clip and update; a gradient that is not finite leaves the weights as they are.

        Returns:
            Norm of the gradient of all ranks before clipping; inf if it was not finite.
        """
        self.ds_engine.step()
        self._has_unused_gradients = False
        grad_norm = float(self.ds_engine.get_global_grad_norm())
        if not self.ds_engine.was_step_applied():
            logger.warning("grad_norm is not finite: the update is skipped")
            return grad_norm if not math.isfinite(grad_norm) else math.inf
        return grad_norm

    def train_batch(self, data, loss_function):
        """verl's, with the features' figures among the metrics."""
        assert self.ranks is not None
        self.ranks.begin_update()
        output = super().train_batch(data, loss_function)
        output["metrics"].update(self.ranks.metrics())
        return output

    def to(self, device: str, model: bool = True, optimizer: bool = True, grad: bool = True) -> None:
        """Move states between the accelerator and host memory; nothing to do on a CPU.

        DeepSpeed brings everything back together, so whatever the settings offload is offloaded together too.
        """
        if get_device_name() == "cpu":
            return
        if self.ds_engine is None:
            if model:
                self.module.to(get_device_id() if device != "cpu" else "cpu")
        elif self.optimizer is not None and device == "cpu":
            self._offload(model or self._is_offload_param, optimizer or self._is_offload_optimizer)
        elif self.optimizer is not None and self.ds_engine.optimizer.offloaded_states:
            self.ds_engine.reload_states()

    def _offload(self, model: bool, optimizer: bool) -> None:
        from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as State

        wanted = {State.lp_params} if model else set()
        if optimizer:
            wanted |= {State.hp_params, State.optim_states}
        if wanted:
            self.ds_engine.offload_states(include=wanted, pin_memory=False)

    @contextmanager
    def _on_device(self):
        """DeepSpeed reads and writes checkpoints from the accelerator."""
        self.to(get_device_name())
        yield
        self.to("cpu", model=self._is_offload_param, optimizer=self._is_offload_optimizer, grad=False)

    def save_checkpoint(self, local_path, hdfs_path=None, global_step=0, max_ckpt_to_keep=None, **kwargs) -> None:
        with self._on_device():
            self.checkpoint_manager.save_checkpoint(local_path, hdfs_path, global_step, max_ckpt_to_keep)

    def load_checkpoint(self, local_path, hdfs_path=None, del_local_after_load=True, **kwargs) -> None:
        with self._on_device():
            self.checkpoint_manager.load_checkpoint(local_path, hdfs_path, del_local_after_load)

    def get_per_tensor_param(self, **kwargs):
        """Return a generator of (name, whole weight), which every rank must run to its end, and None for LoRA."""
        if self.zero_stage == 3:
            self.to(get_device_name())
        module = getattr(self.module, "module", self.module)
        tensors = self.ranks.held_weights() if self.ranks is not None else None
        tensors = weights.full_tensors(module) if tensors is None else tensors
        return exported(tensors, module, self.model_config.hf_config.model_type, get_device_id()), None

    def get_per_tensor_param_shard(self, **kwargs):
        raise ConfigError("strategy=deepspeed sends whole weights; delta checkpoint engines need strategy=fsdp2")


class DeepSpeedEngineWithLMHead(DeepSpeedMixin, FSDPEngineWithLMHead):
    """Policies and reference policies."""


class DeepSpeedEngineWithValueHead(DeepSpeedMixin, FSDPEngineWithValueHead):
    """Critics."""
