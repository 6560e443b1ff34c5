"""Import verl as a Ray process of an rl_accel run does and report which hooks took hold, as JSON on the last line."""

from __future__ import annotations

import importlib
import json
import os

from rl_accel.feature import load
from rl_accel.hosts.verl import plugin


def probe() -> dict[str, bool]:
    """Return hook -> live. Run in a fresh process with `RL_ACCEL_ACTIVE` set to the features that are on, and
    `VERL_PLATFORM=cpu` without a GPU."""
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
    from verl.utils.config import validate_config

    from rl_accel.hosts.verl.prepare import TRAINER_NAME

    importlib.import_module("verl.trainer.ppo.v1")
    live = {
        "validate_config": hasattr(validate_config, "__wrapped__"),
        "trainer": TRAINER_NAME in TRAINER_REGISTRY,
    }
    for patch in [*plugin.patches(), load(plugin.RANKS[1])]:
        live[f"patch {patch.__name__}"] = patch.is_live(importlib.import_module(patch.module_name()))
    if os.environ.get("VERL_PLATFORM") == "cpu":
        from verl.utils.device import get_device_name

        from rl_accel.hosts.verl import cpu_patches

        live["cpu platform"] = get_device_name() == "cpu"
        for patch in cpu_patches.PATCHES:
            live[f"patch {patch.__name__}"] = patch.is_live(importlib.import_module(patch.module_name()))
    return live


if __name__ == "__main__":
    print(json.dumps(probe()))
