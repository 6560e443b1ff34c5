"""The machine that a run is sized for, and the environment variables that its processes need."""

from __future__ import annotations

import netrc
import os
import platform
from typing import Any
from urllib.parse import urlsplit

import psutil


def has_gpu() -> bool:
    """True if torch sees an NVIDIA GPU. `RL_ACCEL_DEVICE=cpu|gpu` overrides."""
    forced = os.environ.get("RL_ACCEL_DEVICE", "").lower()
    if forced in ("cpu", "gpu"):
        return forced == "gpu"
    import torch

    return torch.cuda.is_available()


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


def set_environment(on_cpu: bool) -> None:
    """Set what the hosts read from the environment, before they are imported. What the user set stays.

    Args:
        on_cpu: the run will use the CPU platform of rl_accel.
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
            "VLLM_CPU_KVCACHE_SPACE": "1",
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
