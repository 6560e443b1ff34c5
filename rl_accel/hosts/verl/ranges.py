"""Types and ranges of verl's settings, checked before verl is imported, which takes seconds.

Types come from verl's own flattened configuration (`_generated_ppo_trainer.yaml` in its package): where it has a
number, a switch, a text, a list or a group, so must the user. Ranges are the table below: settings for which verl or
vLLM fail later, in another process and in words of their own. Left out: settings without a default (null, or taken
from another one) that are not in the table, profilers, and how settings fit together (`checks.py`). Costs about 0.1 s.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from rl_accel.config import MAX_SEED, leaves
from rl_accel.errors import ConfigError

FLATTENED = "_generated_ppo_trainer.yaml"


@dataclass(frozen=True)
class Int:
    """A whole number, `low` to `high`."""

    low: int
    high: int = 2**62
    optional: bool = False

    def problem(self, value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int):
            return "must be a whole number"
        if not self.low <= value <= self.high:
            return f"must be at least {self.low}" if value < self.low else f"must be at most {self.high}"
        return None


@dataclass(frozen=True)
class Number:
    """A finite number, `low` to `high`; `above`: not `low` itself."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    optional: bool = False

    def problem(self, value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "must be a number"
        if not math.isfinite(value):
            return "must be a finite number"
        if value < self.low or (self.above and value == self.low):
            return f"must be {'more than' if self.above else 'at least'} {self.low:g}"
        return f"must be at most {self.high:g}" if value > self.high else None


@dataclass(frozen=True)
class OneOf:
    """One of some words."""

    words: tuple[str, ...]
    optional: bool = False

    def problem(self, value: Any) -> str | None:
        if value in self.words:
            return None
        near = difflib.get_close_matches(str(value), self.words, n=1, cutoff=0.5)
        return f"must be one of {', '.join(self.words)}" + (f"; did you mean {near[0]}?" if near else "")


COUNT, MAYBE_COUNT, NOT_NEGATIVE = Int(1), Int(1, optional=True), Int(0)
SWITCHED_OFF_BY_MINUS_1 = Int(-1)
SEED = Int(0, MAX_SEED)
FRACTION = Number(0, 1)
_KL = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")
KL = OneOf((*_KL, *(f"{name}+" for name in _KL)))

RANGES: dict[str, Int | Number | OneOf] = {
    "data.train_batch_size": COUNT,
    "data.gen_batch_size": MAYBE_COUNT,
    "data.max_prompt_length": COUNT,
    "data.max_response_length": COUNT,
    "data.train_max_samples": SWITCHED_OFF_BY_MINUS_1,
    "data.val_max_samples": SWITCHED_OFF_BY_MINUS_1,
    "data.train_size": MAYBE_COUNT,
    "data.val_size": MAYBE_COUNT,
    "data.dataloader_num_workers": NOT_NEGATIVE,
    "data.seed": Int(0, MAX_SEED, optional=True),
    "data.truncation": OneOf(("error", "left", "right", "middle")),
    "actor_rollout_ref.actor.ppo_mini_batch_size": COUNT,
    "actor_rollout_ref.actor.ppo_micro_batch_size": MAYBE_COUNT,
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": MAYBE_COUNT,
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": COUNT,
    "actor_rollout_ref.actor.ppo_epochs": COUNT,
    "actor_rollout_ref.actor.clip_ratio": Number(0),
    "actor_rollout_ref.actor.clip_ratio_low": Number(0),
    "actor_rollout_ref.actor.clip_ratio_high": Number(0),
    "actor_rollout_ref.actor.clip_ratio_c": Number(1, above=True),
    "actor_rollout_ref.actor.entropy_coeff": Number(),
    "actor_rollout_ref.actor.kl_loss_coef": Number(),
    "actor_rollout_ref.actor.grad_clip": Number(0, above=True),
    "actor_rollout_ref.actor.data_loader_seed": SEED,
    "actor_rollout_ref.actor.loss_agg_mode": OneOf(
        ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
    ),
    "actor_rollout_ref.actor.optim.lr": Number(0),
    "actor_rollout_ref.actor.optim.weight_decay": Number(0),
    "actor_rollout_ref.actor.optim.clip_grad": Number(0, above=True),
    "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": FRACTION,
    "actor_rollout_ref.actor.optim.min_lr_ratio": Number(0, 1, optional=True),
    "actor_rollout_ref.actor.optim.lr_scheduler_type": OneOf(("constant", "cosine", "linear", "inverse-square-root")),
    "actor_rollout_ref.actor.optim.warmup_style": OneOf(("constant", "cosine"), optional=True),
    "actor_rollout_ref.actor.fsdp_config.strategy": OneOf(("fsdp", "fsdp2", "deepspeed"), optional=True),
    "actor_rollout_ref.actor.fsdp_config.fsdp_size": SWITCHED_OFF_BY_MINUS_1,
    "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size": COUNT,
    "actor_rollout_ref.actor.ulysses_sequence_parallel_size": COUNT,
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": MAYBE_COUNT,
    "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu": COUNT,
    "actor_rollout_ref.model.lora_rank": NOT_NEGATIVE,
    "actor_rollout_ref.rollout.n": COUNT,
    "actor_rollout_ref.rollout.temperature": Number(0, above=True),
    "actor_rollout_ref.rollout.top_k": SWITCHED_OFF_BY_MINUS_1,
    "actor_rollout_ref.rollout.top_p": Number(0, 1, above=True),
    "actor_rollout_ref.rollout.prompt_length": COUNT,
    "actor_rollout_ref.rollout.response_length": COUNT,
    "actor_rollout_ref.rollout.seed": SEED,
    "actor_rollout_ref.rollout.tensor_model_parallel_size": COUNT,
    "actor_rollout_ref.rollout.data_parallel_size": COUNT,
    "actor_rollout_ref.rollout.pipeline_model_parallel_size": COUNT,
    "actor_rollout_ref.rollout.expert_parallel_size": COUNT,
    "actor_rollout_ref.rollout.gpu_memory_utilization": Number(0, 1, above=True),
    "actor_rollout_ref.rollout.max_model_len": MAYBE_COUNT,
    "actor_rollout_ref.rollout.max_num_batched_tokens": COUNT,
    "actor_rollout_ref.rollout.max_num_seqs": COUNT,
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": MAYBE_COUNT,
    "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu": COUNT,
    "actor_rollout_ref.rollout.dtype": OneOf(("auto", "bfloat16", "float16", "float32", "half", "float")),
    "actor_rollout_ref.rollout.val_kwargs.n": COUNT,
    "actor_rollout_ref.rollout.val_kwargs.temperature": Number(0),
    "actor_rollout_ref.rollout.val_kwargs.top_k": SWITCHED_OFF_BY_MINUS_1,
    "actor_rollout_ref.rollout.val_kwargs.top_p": Number(0, 1, above=True),
    "actor_rollout_ref.rollout.agent.num_workers": COUNT,
    "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes": COUNT,
    "actor_rollout_ref.rollout.disaggregation.prefill_replicas": COUNT,
    "actor_rollout_ref.rollout.over_sample_rate": FRACTION,
    "actor_rollout_ref.rollout.trace.max_samples_per_step_per_worker": Int(0, optional=True),
    "actor_rollout_ref.model.lora_alpha": Number(0),
    "actor_rollout_ref.model.lora.alpha": Number(0),
    "critic.ppo_mini_batch_size": COUNT,
    "critic.ppo_micro_batch_size_per_gpu": MAYBE_COUNT,
    "critic.ppo_epochs": COUNT,
    "critic.optim.lr": Number(0),
    "reward.num_workers": COUNT,
    "algorithm.gamma": FRACTION,
    "algorithm.lam": FRACTION,
    "algorithm.kl_ctrl.kl_coef": Number(0),
    "algorithm.kl_ctrl.type": OneOf(("fixed", "adaptive")),
    "algorithm.kl_penalty": KL,
    "actor_rollout_ref.actor.kl_loss_type": KL,
    "transfer_queue.backend.SimpleStorage.num_data_storage_units": COUNT,
    "transfer_queue.backend.SimpleStorage.total_storage_size": COUNT,
    "trainer.total_epochs": COUNT,
    "trainer.total_training_steps": MAYBE_COUNT,
    "trainer.n_gpus_per_node": COUNT,
    "trainer.nnodes": COUNT,
    "trainer.save_freq": SWITCHED_OFF_BY_MINUS_1,
    "trainer.test_freq": SWITCHED_OFF_BY_MINUS_1,
    "trainer.critic_warmup": NOT_NEGATIVE,
    "trainer.log_val_generations": NOT_NEGATIVE,
    "trainer.esi_redundant_time": Number(0),
    "trainer.max_actor_ckpt_to_keep": MAYBE_COUNT,
    "trainer.max_critic_ckpt_to_keep": MAYBE_COUNT,
    "trainer.device": OneOf(("cuda", "cpu", "npu")),
    "trainer.resume_mode": OneOf(("auto", "disable", "resume_path")),
    "ray_kwargs.ray_init.num_cpus": MAYBE_COUNT,
    "ray_kwargs.ray_init.num_gpus": Int(0, optional=True),
}
"""Setting -> what it may be. A setting that the configuration does not have is not checked."""


_TEXT_ENDS = ("path", "_dir", "_file", "_module", "_lib")
"""Of the names of settings that are null by default and name something."""


def check(config: DictConfig, verl_config_dir: Path) -> None:
    """Raise ConfigError for the first setting of a wrong type or out of range, the table first.

    Args:
        verl_config_dir: folder of verl's own configuration; without the flattened file in it types are not checked.
    """
    values = dict(leaves(OmegaConf.to_container(config, resolve=True)))  # type: ignore[arg-type]
    groups = {group for name in values for group in _groups_of(name)}
    for name, allowed in RANGES.items():
        if name in groups:
            raise ConfigError(f"{name} is not a group of settings")
        if name not in values or (values[name] is None and allowed.optional):
            continue
        problem = allowed.problem(values[name])
        if problem is not None:
            raise ConfigError(f"{name}={_shown(values[name])}: {problem}")
    for name, default in _defaults(verl_config_dir / FLATTENED):
        _check_type(name, default, values, groups)


@functools.cache
def _defaults(flattened: Path) -> tuple[tuple[str, Any], ...]:
    if not flattened.is_file():
        return ()
    return tuple(leaves(yaml.load(flattened.read_bytes(), yaml.CSafeLoader)))


def _check_type(name: str, default: Any, values: Mapping[str, Any], groups: set[str]) -> None:
    group = next((above for above in _groups_of(name) if values.get(above)), None)
    if group is not None or (isinstance(default, dict) and values.get(name)):
        group = group or name
        raise ConfigError(f"{group}={_shown(values[group])}: must be a group of settings")
    value, wanted = values.get(name), _kind(name, default)
    if wanted is not None and name in groups:
        raise ConfigError(f"{name} is not a group of settings")
    if name in RANGES or value is None or wanted is None:
        return
    kinds, words = wanted
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ConfigError(f"{name}={_shown(value)}: must be {words}")


def _groups_of(name: str) -> Iterator[str]:
    """`a.b.c` is in the groups `a.b` and `a`; one that has settings is no leaf, and so not among the values."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _kind(name: str, default: Any) -> tuple[tuple[type, ...], str] | None:
    """What a value beside this default may be, and that in words; None: anything."""
    if isinstance(default, bool):
        return (bool,), "true or false"
    if isinstance(default, int):
        return (int,), "a whole number"
    if isinstance(default, float):
        return (int, float), "a number"
    if isinstance(default, list):
        return (list, str), "a list or a text"
    if isinstance(default, str) and not default.startswith(("${", "???")):
        # Files may be several, and a name such as 2024 is read as a number.
        return ((str, int), "a text") if name.endswith("_name") else ((str, list), "a text")
    if default is None and name.endswith(_TEXT_ENDS):
        return (str,), "a text"
    return None


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
