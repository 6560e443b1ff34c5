"""Checks of a verl configuration before Ray starts: one clear error each, and nothing lost.

verl and vLLM find most of these too, minutes later and in another process. Nothing here imports a host, so that a
refusal takes less than two seconds. Types and ranges of single settings are in `ranges.py`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rl_accel import data, recipes
from rl_accel.errors import ConfigError
from rl_accel.feature import Driver
from rl_accel.hosts.verl import cluster, model_files, ranges

MIN_FREE_MEMORY_CPU = 8 << 30
"""Bytes. A run of the tiny policy without a GPU was measured to need about 7 GB."""
MEMORY_PER_RANK_CPU = 2 << 30
"""Bytes for every further rank, with its rollout engine; two ranks were measured to need about 8.7 GB."""
GROUPS = (
    "actor_rollout_ref.actor",
    "actor_rollout_ref.rollout",
    "actor_rollout_ref.model",
    "algorithm",
    "data",
    "trainer",
)
ESTIMATORS = (
    "gae",
    "grpo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "rloo",
    "opo",
    "grpo_passk",
    "gpg",
    "rloo_vectorized",
    "grpo_vectorized",
    "optimal_token_baseline",
    "tir_optimal_token_baseline",
    "gdpo",
)
"""Of verl 0.9.1. A recipe with code of its own (`model.external_lib`) may register others."""


def check_settings(config: DictConfig, drivers: Sequence[Driver]) -> None:
    """Raise ConfigError for what cannot work, looking at nothing but the configuration."""
    with _as_config_errors():
        _check_groups(config)
        ranges.check(config, recipes.verl_config_dir())
        _check_hosts(config)
        engine = OmegaConf.select(config, "actor_rollout_ref.rollout.engine_kwargs.vllm") or {}
        for driver in drivers:
            driver.check_engine_args(engine, on_gpu=config.trainer.device != "cpu")
            driver.check(config)
        _check_algorithm(config)
        _check_engines(config)
        _check_policy(config)
        _check_lengths(config)
        _check_batches(config)
        cluster.check_settings(config)
        if config.trainer.device == "cpu":
            _check_without_gpu(config)


def check_run(config: DictConfig, drivers: Sequence[Driver]) -> None:
    """Raise ConfigError for files, folders and a machine that do not fit the configuration."""
    with _as_config_errors():
        for driver in drivers:
            driver.check_run(config)
        _check_paths(config)
        _check_machine(config)


@contextmanager
def _as_config_errors() -> Iterator[None]:
    """A setting that is missing, or a reference to one, is found when it is read."""
    try:
        yield
    except OmegaConfBaseException as error:
        raise ConfigError(f"the configuration is not complete: {str(error).splitlines()[0]}") from error


def _check_groups(config: DictConfig) -> None:
    for name in GROUPS:
        if not isinstance(OmegaConf.select(config, name), DictConfig):
            raise ConfigError(
                f"the configuration has no group {name}; a recipe builds on verl's settings or on another recipe: "
                "begin it with `# @package _global_` and `defaults: [/gsm8k_grpo/base, _self_]`"
            )


def _check_hosts(config: DictConfig) -> None:
    rollout, trainer = config.actor_rollout_ref.rollout, config.trainer
    if rollout.name != "vllm":
        raise ConfigError(f"rl_accel drives vLLM rollouts; actor_rollout_ref.rollout.name is {rollout.name!r}")
    mode = OmegaConf.select(trainer, "v1.trainer_mode")
    if not trainer.get("use_v1", True) or mode not in ("sync", "rl_accel_sync"):
        raise ConfigError(
            "rl_accel supports verl's synchronous V1 trainer: trainer.use_v1=True trainer.v1.trainer_mode=sync; got "
            f"use_v1={trainer.get('use_v1', True)}, trainer_mode={mode}"
        )


def _check_algorithm(config: DictConfig) -> None:
    name = config.algorithm.adv_estimator
    if name not in ESTIMATORS and not config.actor_rollout_ref.model.get("external_lib"):
        raise ConfigError(f"algorithm.adv_estimator={name}: verl 0.9.1 knows {', '.join(ESTIMATORS)}")
    actor = config.actor_rollout_ref.actor
    schedule = OmegaConf.select(actor, "optim.lr_scheduler_type")
    if actor.strategy in ("fsdp", "fsdp2", "deepspeed") and schedule not in (None, "constant", "cosine"):
        raise ConfigError(f"actor_rollout_ref.actor.optim.lr_scheduler_type={schedule}: must be constant or cosine")


def _check_engines(config: DictConfig) -> None:
    rollout = config.actor_rollout_ref.rollout
    for name in ("data_parallel_size", "pipeline_model_parallel_size"):
        if rollout.get(name, 1) > 1:
            raise ConfigError(
                f"actor_rollout_ref.rollout.{name}={rollout[name]}: rl_accel counts and steers engines of tensor-"
                "parallel ranks only. Leave it at 1: verl starts as many engines as the devices allow"
            )
    if rollout.max_num_batched_tokens < rollout.max_num_seqs:
        raise ConfigError(
            f"actor_rollout_ref.rollout.max_num_batched_tokens={rollout.max_num_batched_tokens} is less than "
            f"max_num_seqs={rollout.max_num_seqs}, which vLLM refuses"
        )


def _check_policy(config: DictConfig) -> None:
    policy = model_files.text_config(model_files.policy_config(config))
    if policy.get("model_type") == "olmoe" and policy.get("norm_topk_prob"):
        raise ConfigError(
            f"actor_rollout_ref.model.path={config.actor_rollout_ref.model.path}: an OLMoE with norm_topk_prob=true, "
            "which vLLM computes as if it were false: rollouts would come from another model than the one that trains. "
            "Use a model trained with norm_topk_prob=false"
        )


def _check_lengths(config: DictConfig) -> None:
    """All lengths in tokens."""
    rollout, actor = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor
    limit = model_files.max_position_embeddings(config)
    longest: int | None = rollout.max_model_len or limit
    if limit is not None and longest is not None and longest > limit:
        raise ConfigError(
            f"actor_rollout_ref.rollout.max_model_len={longest}: the model has {limit} positions "
            "(max_position_embeddings)"
        )
    if longest is not None and rollout.prompt_length >= longest:
        where = "rollout.max_model_len" if rollout.max_model_len else "the model's positions"
        raise ConfigError(
            f"prompts of data.max_prompt_length={rollout.prompt_length} tokens leave no tokens for a response within "
            f"{where}={longest}"
        )
    total = rollout.prompt_length + rollout.response_length
    for role, node, switch, budget in (
        ("actor", actor, "use_dynamic_bsz", "ppo_max_token_len_per_gpu"),
        ("rollout", rollout, "log_prob_use_dynamic_bsz", "log_prob_max_token_len_per_gpu"),
    ):
        ulysses = OmegaConf.select(actor, "ulysses_sequence_parallel_size") or 1
        if node.get(switch) and node[budget] * ulysses < total:
            raise ConfigError(
                f"actor_rollout_ref.{role}.{budget}={node[budget]} tokens cannot hold one sequence of "
                f"data.max_prompt_length + max_response_length = {total}"
            )


def _check_paths(config: DictConfig) -> None:
    for role in ("actor_rollout_ref", "critic") if _has_critic(config) else ("actor_rollout_ref",):
        model = str(OmegaConf.select(config, f"{role}.model.path"))
        if model_files.is_local(model) and not Path(model).expanduser().is_dir():
            raise ConfigError(f"{role}.model.path={model}: no such folder")
    if config.trainer.get("resume_mode") == "resume_path":
        _check_resume_path(config.trainer.get("resume_from_path"))
    for key in ("data.train_files", "data.val_files"):
        value = OmegaConf.select(config, key)
        if not value:
            raise ConfigError(f"{key} is not set; name parquet files, or set data.source to gsm8k or generated")
        for path in value if isinstance(value, list | ListConfig) else [value]:
            if "://" not in str(path) and not Path(str(path)).expanduser().exists():
                raise ConfigError(f"{key}={path}: no such file")
        _check_rows(config, key, [str(path) for path in ([value] if isinstance(value, str) else value)])


def _has_critic(config: DictConfig) -> bool:
    """As `verl.trainer.ppo.utils.need_critic`."""
    enabled = OmegaConf.select(config, "critic.enable")
    return config.algorithm.adv_estimator == "gae" if enabled is None else bool(enabled)


def _check_rows(config: DictConfig, key: str, files: list[str]) -> None:
    rows = data.num_rows(files)
    if rows is None:
        return
    samples = config.data.get("train_max_samples" if key == "data.train_files" else "val_max_samples", -1)
    rows = min(rows, samples) if samples > 0 else rows
    needed = config.data.train_batch_size if key == "data.train_files" else 1
    if rows < needed:
        raise ConfigError(f"{key} has {rows} rows; a step takes {needed} (data.train_batch_size)")


def _check_resume_path(path: str | None) -> None:
    if not path or "global_step_" not in str(path):
        raise ConfigError(
            f"trainer.resume_mode=resume_path needs trainer.resume_from_path=.../global_step_N; got {path}"
        )
    if not Path(path).expanduser().is_dir():
        raise ConfigError(f"trainer.resume_from_path={path}: no such folder")


def _check_batches(config: DictConfig) -> None:
    data, actor, rollout = config.data, config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    devices = config.trainer.n_gpus_per_node * config.trainer.nnodes
    batch, mini = data.train_batch_size, actor.ppo_mini_batch_size
    if mini > batch:
        raise ConfigError(
            f"actor.ppo_mini_batch_size={mini} is larger than data.train_batch_size={batch} (both in prompts)"
        )
    if config.data.get("train_size") is not None and config.data.train_size < batch:
        raise ConfigError(f"data.train_size={config.data.train_size} is less than data.train_batch_size={batch}")
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
    if config.data.get("gen_batch_size") and batch % config.data.gen_batch_size:
        raise ConfigError(
            f"data.train_batch_size={batch} is not a multiple of data.gen_batch_size={config.data.gen_batch_size}"
        )
    micro = actor.get("ppo_micro_batch_size_per_gpu")
    _check_micro_batches(config)
    if not actor.use_dynamic_bsz and micro and (mini * rollout.n // devices) % micro:
        raise ConfigError(
            f"a mini-batch of {mini * rollout.n // devices} samples per device is not a multiple of "
            f"actor.ppo_micro_batch_size_per_gpu={micro}"
        )


def _check_micro_batches(config: DictConfig) -> None:
    """Without dynamic batches verl needs one of two settings in every role, and only one."""
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    roles = [("actor_rollout_ref.actor", actor, "ppo_micro_batch_size", actor.use_dynamic_bsz)]
    roles += [("actor_rollout_ref.rollout", rollout, "log_prob_micro_batch_size", actor.use_dynamic_bsz)]
    if actor.use_kl_loss or config.algorithm.get("use_kl_in_reward"):
        ref = config.actor_rollout_ref.ref
        roles += [("actor_rollout_ref.ref", ref, "log_prob_micro_batch_size", actor.use_dynamic_bsz)]
    if _has_critic(config):
        roles += [("critic", config.critic, "ppo_micro_batch_size", config.critic.use_dynamic_bsz)]
    for role, node, name, dynamic in roles:
        given = [key for key in (name, f"{name}_per_gpu") if node.get(key) is not None]
        if dynamic or len(given) == 1:
            continue
        raise ConfigError(f"{role}: set {name}_per_gpu" + (f", not {name} beside it" if given else ""))


def _check_machine(config: DictConfig) -> None:
    if config.trainer.device == "cpu":
        _check_memory_without_gpu(config)
    elif config.trainer.device == "cuda" and config.trainer.nnodes == 1 and not cluster.address(config):
        _check_gpus(config)


def _check_without_gpu(config: DictConfig) -> None:
    trainer, model, ray_init = config.trainer, config.actor_rollout_ref.model, config.ray_kwargs.ray_init
    if model.get("lora_rank", 0) or OmegaConf.select(model, "lora.rank") or model.get("lora_adapter_path"):
        raise ConfigError(
            "actor_rollout_ref.model.lora_rank: LoRA needs a GPU; vLLM's CPU build repacks its weights and cannot take "
            "adapters from the trainer. Train all weights with lora_rank=0"
        )
    if config.actor_rollout_ref.actor.strategy == "fsdp":
        raise ConfigError("actor_rollout_ref.actor.strategy=fsdp: without a GPU use fsdp2 or deepspeed")
    logical = ray_init.get("num_gpus")
    if cluster.address(config):
        return  # `cluster.check_nodes` asks the cluster
    if logical is not None and logical < trainer.n_gpus_per_node:
        raise ConfigError(
            f"trainer.n_gpus_per_node={trainer.n_gpus_per_node} ranks wait for ray_kwargs.ray_init.num_gpus={logical} "
            "logical devices: give both the same number"
        )
    # Held by verl for as long as it runs: 3 a rank, 1 a storage unit, 1 for TransferQueue; every start takes one more.
    units = OmegaConf.select(config, "transfer_queue.backend.SimpleStorage.num_data_storage_units") or 1
    needed, cores = 3 * trainer.n_gpus_per_node + units + 2, ray_init.get("num_cpus")
    if cores is not None and cores < needed:
        raise ConfigError(
            f"ray_kwargs.ray_init.num_cpus={cores}: verl would wait for ever for {needed} logical processors; give "
            "more, also where the machine has fewer"
        )


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
