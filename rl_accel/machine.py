"""The machine that a run is sized for, and the environment variables that its processes need."""

from __future__ import annotations

import netrc
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from urllib.parse import urlsplit

import psutil

from rl_accel.errors import ConfigError


def has_gpu() -> bool:
    """True if there is a GPU to train on. `RL_ACCEL_DEVICE=cpu|gpu` overrides.

    The driver is asked, not torch, whose import takes seconds; torch is asked where it is a build for other GPUs.

    Raises:
        ConfigError: for another value of `RL_ACCEL_DEVICE`.
    """
    forced = os.environ.get("RL_ACCEL_DEVICE", "").strip().lower()
    if forced:
        if forced not in ("cpu", "gpu"):
            raise ConfigError(f"RL_ACCEL_DEVICE={forced}: must be cpu or gpu")
        return forced == "gpu"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return False
    if "rocm" in _torch_version():
        import torch

        return torch.cuda.is_available()
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no library, no driver: each says it in another way
        return False
    try:
        return pynvml.nvmlDeviceGetCount() > 0
    finally:
        pynvml.nvmlShutdown()


def _torch_version() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""


def describe() -> dict[str, Any]:
    """Return what a result depends on: processor, cores, memory in GiB, GPUs."""
    gpus: list[str] = []
    if has_gpu():
        import torch

        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpus,
        "system": platform.platform(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def set_environment(on_cpu: bool, kv_cache_bytes: int | None = None) -> None:
    """Set what the hosts read from the environment, before they are imported. What the user set stays.

    Args:
        on_cpu: the run will use the CPU platform of rl_accel.
        kv_cache_bytes: vLLM's `kv_cache_memory_bytes`, which its environment variable would overrule.
    """
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "TOKENIZERS_PARALLELISM": "true",
    }
    if on_cpu:
        defaults |= {
            "VERL_PLATFORM": "cpu",
            **({} if kv_cache_bytes else {"VLLM_CPU_KVCACHE_SPACE": "1"}),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # vLLM's CPU platform turns the executor `uni` back without it
            "OMP_NUM_THREADS": str(os.cpu_count() or 1),
        }
    if not wandb_logged_in():
        defaults["WANDB_MODE"] = "offline"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def wandb_logged_in() -> bool:
    """True if wandb has a key for its server: in the environment or in netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
