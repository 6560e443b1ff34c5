"""Checks of a verl configuration before Ray starts: one clear error each, and nothing lost.

verl and vLLM find most of these too, minutes later and in another process.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil
from omegaconf import DictConfig, ListConfig, OmegaConf

from rl_accel.config import AccelConfig
from rl_accel.errors import ConfigError
from rl_accel.hosts import versions
from rl_accel.hosts.verl import deepspeed_checks

MIN_FREE_MEMORY_CPU = 8 << 30
"""Bytes. A run of the tiny policy without a GPU was measured to need about 7 GB."""
MEMORY_PER_RANK_CPU = 2 << 30
"""Bytes for every further rank, with its rollout engine; two ranks were measured to need about 8.7 GB."""


def check(config: DictConfig, accel: AccelConfig) -> None:
    """Raise ConfigError for what cannot work, cheapest checks first."""
    _check_hosts(config)
    _check_drafting(accel)
    deepspeed_checks.check(config, accel.deepspeed, asked_for=deepspeed_checks.given(accel))
    deepspeed_checks.check_comm(config, accel)
    _check_paths(config)
    _check_batches(config)
    _check_machine(config)


def _check_hosts(config: DictConfig) -> None:
    rollout = config.actor_rollout_ref.rollout
    if rollout.name != "vllm":
        raise ConfigError(f"rl_accel drives vLLM rollouts; actor_rollout_ref.rollout.name is {rollout.name!r}")
    if not config.trainer.use_v1 or config.trainer.v1.trainer_mode not in ("sync", "rl_accel_sync"):
        raise ConfigError(
            "rl_accel supports verl's synchronous V1 trainer: trainer.use_v1=True trainer.v1.trainer_mode=sync; got "
            f"use_v1={config.trainer.use_v1}, trainer_mode={config.trainer.v1.trainer_mode}"
        )


def _check_drafting(accel: AccelConfig) -> None:
    if accel.draft.method == "suffix" and versions.installed("arctic-inference") is None:
        raise ConfigError(
            "rl_accel.draft.method=suffix is vLLM's suffix decoding, which needs the package arctic-inference: "
            "run scripts/install_arctic.sh"
        )


def _check_paths(config: DictConfig) -> None:
    model = str(config.actor_rollout_ref.model.path)
    if _looks_local(model) and not Path(model).expanduser().is_dir():
        raise ConfigError(f"actor_rollout_ref.model.path={model}: no such folder")
    for key in ("data.train_files", "data.val_files"):
        value = OmegaConf.select(config, key)
        for path in value if isinstance(value, list | ListConfig) else [value]:
            if not str(path).startswith("hdfs://") and not Path(str(path)).expanduser().exists():
                raise ConfigError(f"{key}={path}: no such file")


def _looks_local(model: str) -> bool:
    """A hub name is `owner/name`; anything else names a folder."""
    return model.startswith(("/", ".", "~")) or model.count("/") != 1


def _check_batches(config: DictConfig) -> None:
    data, actor, rollout = config.data, config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    devices = config.trainer.n_gpus_per_node * config.trainer.nnodes
    batch, mini = data.train_batch_size, actor.ppo_mini_batch_size
    if mini > batch:
        raise ConfigError(
            f"actor.ppo_mini_batch_size={mini} is larger than data.train_batch_size={batch} (both in prompts)"
        )
    if batch % mini:
        raise ConfigError(
            f"data.train_batch_size={batch} is not a multiple of actor.ppo_mini_batch_size={mini} (both in prompts)"
        )
    if (mini * rollout.n) % devices:
        raise ConfigError(
            f"a mini-batch of {mini} prompts x rollout.n={rollout.n} = {mini * rollout.n} samples does not divide "
            f"over {devices} devices (trainer.n_gpus_per_node x nnodes)"
        )
    per_engine = rollout.tensor_model_parallel_size * rollout.get("pipeline_model_parallel_size", 1)
    if devices % per_engine:
        raise ConfigError(
            f"{devices} devices do not divide into engines of {per_engine} "
            "(rollout.tensor_model_parallel_size x pipeline_model_parallel_size)"
        )
    micro = actor.get("ppo_micro_batch_size_per_gpu")
    if not actor.use_dynamic_bsz and micro and (mini * rollout.n // devices) % micro:
        raise ConfigError(
            f"a mini-batch of {mini * rollout.n // devices} samples per device is not a multiple of "
            f"actor.ppo_micro_batch_size_per_gpu={micro}"
        )


def _check_machine(config: DictConfig) -> None:
    if config.trainer.device == "cpu":
        _check_memory_without_gpu(config)
    elif (
        config.trainer.device == "cuda" and config.trainer.nnodes == 1 and not config.ray_kwargs.ray_init.get("address")
    ):
        _check_gpus(config)


def _check_gpus(config: DictConfig) -> None:
    memories, wanted = _gpu_memories(), config.trainer.n_gpus_per_node
    if len(memories) < wanted:
        raise ConfigError(f"trainer.n_gpus_per_node={wanted}; this machine has {len(memories)} GPUs")
    utilization = float(config.actor_rollout_ref.rollout.gpu_memory_utilization)
    enough = sum(free >= utilization * total for free, total in memories)
    if enough < wanted:
        raise ConfigError(
            f"actor_rollout_ref.rollout.gpu_memory_utilization={utilization:g} of its memory is free on {enough} GPUs, "
            f"{wanted} are needed; the emptiest has {max(memories)[0] / 2**30:.1f} GiB free. End what else runs there"
        )


def _gpu_memories() -> list[tuple[int, int]]:
    """Return (free, total) bytes of every GPU, asked of the driver: a CUDA context here would itself take memory."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception as error:
        raise ConfigError(
            f"trainer.device=cuda, and no NVIDIA driver answers here ({error}). Without a GPU use recipe=gsm8k_grpo/cpu"
        ) from error
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        memories = [pynvml.nvmlDeviceGetMemoryInfo(handle) for handle in handles]
        return [(int(memory.free), int(memory.total)) for memory in memories]
    finally:
        pynvml.nvmlShutdown()


def _check_memory_without_gpu(config: DictConfig) -> None:
    available, ranks = psutil.virtual_memory().available, config.trainer.n_gpus_per_node
    needed = MIN_FREE_MEMORY_CPU + (ranks - 1) * MEMORY_PER_RANK_CPU
    if available < needed:
        raise ConfigError(
            f"a run without a GPU on {ranks} ranks (trainer.n_gpus_per_node) needs about {needed >> 30} GiB of free "
            f"memory; {available / 2**30:.1f} GiB are free"
        )
    bucket = int(config.actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes) << 20
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    if free < 2 * bucket:
        raise ConfigError(
            f"weights travel through shared memory in buckets of {bucket >> 20} MiB; /dev/shm has {free >> 20} MiB "
            "free. Lower actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes or enlarge it "
            "(docker: --shm-size)"
        )
