"""Random configurations through the preflight: refused in one line, or good enough for verl's own checks."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf, open_dict

from rl_accel import recipes
from rl_accel.config import leaves
from rl_accel.errors import ConfigError
from rl_accel.hosts.verl import checks, prepare, ranges

FACTOR = int(os.environ.get("RL_ACCEL_SOAK", "1"))
POLICY = Path(checks.__file__).parents[2] / "quickstart" / "policy"
DEFAULTS = yaml.load((recipes.verl_config_dir() / ranges.FLATTENED).read_bytes(), yaml.CSafeLoader)
OURS = [f"rl_accel.{name}" for name in ("draft.method", "draft.window", "draft.history_gib", "sync.timeout_s", "seed")]
OURS += [f"rl_accel.{name}" for name in ("draft", "sampling.exact", "comm.enable", "deepspeed.zero_stage", "trace")]
OURS += ["rl_accel.allow_lossy", "rl_accel.fast_path.enable"]
IN_USE = ("actor_rollout_ref.actor", "actor_rollout_ref.rollout", "algorithm", "data", "trainer", "ray_kwargs.ray_init")
NAMES = sorted({*ranges.RANGES, *OURS, *(name for name, _ in leaves(DEFAULTS) if name.startswith(IN_USE))})
NAMES = [name for name in NAMES if not name.endswith("_target_") and "profiler" not in name]
NUMBERS = st.sampled_from([-8, -1, 0, 1, 2, 3, 4, 8, 15, 16, 64, 577, 10**9, 10**23])
VALUES = st.one_of(
    NUMBERS,
    st.sampled_from([0.0, 0.5, 1.0, -1.5, 1e-6, 2.5, float("nan"), float("inf")]),
    st.sampled_from([True, False, None, "", "abc", "auto", "8", "fsdp2", "das", [], [1], {}, {"a": 1}]),
)
BASE = recipes.compose(
    "gsm8k_grpo/cpu",
    [f"{role}.model.path={POLICY}" for role in ("actor_rollout_ref", "critic")] + ["rl_accel.run_dir=/nowhere"],
    has_gpu=False,
)


def changed(choices):
    """The recipe with settings overridden, as a command line would."""
    config = copy.deepcopy(BASE)
    with open_dict(config):
        for name, value in choices.items():
            OmegaConf.update(config, name, value, force_add=True, merge=False)
    return config


def accepted(choices) -> bool:
    """Whether the preflight takes a configuration; anything but one clear error fails the test."""
    try:
        config = changed(choices)
    except Exception:  # OmegaConf itself has no place for it: Hydra refuses it too
        return False
    try:
        prepare.preflight(config)
    except ConfigError as error:
        assert len(str(error)) < 800
        return False
    check_by_verl(config)
    return True


def check_by_verl(config) -> None:
    """verl's own checks of a configuration, which it makes in the driver and when its workers start."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    with open_dict(config):
        config.data.train_files = config.data.val_files = str(POLICY / "config.json")
    for role in ("rollout", "actor"):
        omega_conf_to_dataclass(config.actor_rollout_ref[role])
    omega_conf_to_dataclass(config.algorithm)
    stock = getattr(validate_config, "__wrapped__", validate_config)  # without our hook, which would check once more
    stock(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))


@settings(max_examples=40 * FACTOR, deadline=None, derandomize=FACTOR == 1, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1, max_size=3))
def test_a_configuration_is_refused_in_one_line_or_stands_verls_own_checks(choices):
    accepted(choices)


@settings(max_examples=20 * FACTOR, deadline=None, derandomize=FACTOR == 1, suppress_health_check=list(HealthCheck))
@given(
    st.fixed_dictionaries(
        {
            "data.train_batch_size": st.sampled_from([4, 6, 8, 16]),
            "actor_rollout_ref.actor.ppo_mini_batch_size": st.sampled_from([1, 2, 4, 6, 8]),
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": st.sampled_from([None, 1, 2, 3, 8]),
            "actor_rollout_ref.rollout.n": st.sampled_from([1, 2, 3, 8]),
            "actor_rollout_ref.actor.use_dynamic_bsz": st.booleans(),
            "actor_rollout_ref.actor.use_kl_loss": st.booleans(),
            "trainer.n_gpus_per_node": st.sampled_from([1, 2, 3]),
            "ray_kwargs.ray_init.num_gpus": st.sampled_from([1, 2, 3]),
            "algorithm.adv_estimator": st.sampled_from(["grpo", "gae", "rloo", "remax"]),
        }
    )
)
def test_sizes_that_are_accepted_fit_together(choices):
    accepted(choices)
