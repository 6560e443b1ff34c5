"""What verl 0.9.1 lacks to run on a machine without an accelerator. Loaded only with `VERL_PLATFORM=cpu`.

- a platform: `torch.cpu` behind the interface that verl expects of an accelerator (host symbols: `PlatformBase`,
  `PlatformRegistry.register`); Ray schedules a *logical* GPU (`ray.init(num_gpus=1)`);
- the FSDP2 engines registered for the device "cpu" (`EngineRegistry.register`);
- named patches: `cpu_patches.py`.
"""

from __future__ import annotations

import resource
import types
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from wrapt import register_post_import_hook


def _device_module() -> Any:
    """`torch.cpu` plus the allocator interface of `torch.cuda`; memory is that of this process, in bytes."""
    module: Any = types.ModuleType("rl_accel_cpu_device")
    for name in dir(torch.cpu):
        if not name.startswith("__"):
            setattr(module, name, getattr(torch.cpu, name))

    def nothing(*args, **kwargs) -> None:
        return None

    for name in (
        "empty_cache",
        "ipc_collect",
        "reset_accumulated_memory_stats",
        "reset_peak_memory_stats",
        "set_device",
        "set_per_process_memory_fraction",
        "synchronize",
    ):
        setattr(module, name, nothing)

    def resident(*args, **kwargs) -> int:
        return psutil.Process().memory_info().rss

    def peak(*args, **kwargs) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def mem_get_info(*args, **kwargs) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def properties(*args, **kwargs) -> types.SimpleNamespace:
        return types.SimpleNamespace(total_memory=psutil.virtual_memory().total, name="cpu")

    module.memory_allocated = module.memory_reserved = resident
    module.max_memory_allocated = module.max_memory_reserved = peak
    module.mem_get_info = mem_get_info
    module.get_device_properties = properties
    module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    module.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    module.get_device_name = lambda *args, **kwargs: "cpu"
    module.device_count = lambda: 1
    return module


def _register_platform() -> None:
    from verl.plugin.platform.platform_base import PlatformBase
    from verl.plugin.platform.platform_manager import PlatformRegistry

    @PlatformRegistry.register(platform="cpu")
    class PlatformCPU(PlatformBase):
        device_name = "cpu"
        vendor_name = "cpu"
        device_module = _device_module()

        def is_available(self) -> bool:
            return True

        def is_platform_available(self, use_smi_check: bool = False) -> bool:
            return not torch.cuda.is_available()

        def current_device(self) -> str:
            return "cpu"  # verl uses it as a torch device

        def device_count(self) -> int:
            return 1

        def set_device(self, device_index) -> None:
            return None

        def synchronize(self, device_index=None) -> None:
            return None

        def manual_seed(self, seed: int) -> None:
            torch.manual_seed(seed)

        def manual_seed_all(self, seed: int) -> None:
            torch.manual_seed(seed)

        def set_allocator_settings(self, settings: str) -> None:
            return None

        def empty_cache(self) -> None:
            return None

        def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
            return None, None

        def communication_backend_name(self) -> str:
            return "gloo"

        def visible_devices_envvar(self) -> str:
            return "CUDA_VISIBLE_DEVICES"

        @contextmanager
        def nvtx_range(self, msg: str):
            yield

        def profiler_start(self) -> None:
            return None

        def profiler_stop(self) -> None:
            return None

        def ray_resource_name(self) -> str:
            return "GPU"

        def ray_noset_envvars(self) -> list[str]:
            return []

        def is_ipc_supported(self) -> bool:
            return False  # weights travel through shared memory

        def rollout_env_vars(self) -> dict[str, str]:
            return {}

        def cudart(self) -> None:
            return None


def _register_engines(module) -> None:
    from verl.workers.engine.base import EngineRegistry

    @EngineRegistry.register(model_type="language_model", backend=["fsdp2"], device="cpu")
    class CPUEngineWithLMHead(module.FSDPEngineWithLMHead):
        pass

    @EngineRegistry.register(model_type="value_model", backend=["fsdp2"], device="cpu")
    class CPUEngineWithValueHead(module.FSDPEngineWithValueHead):
        pass


def install() -> None:
    """Register the platform now and the engines as soon as verl imports theirs."""
    _register_platform()
    register_post_import_hook(_register_engines, "verl.workers.engine.fsdp.transformer_impl")
