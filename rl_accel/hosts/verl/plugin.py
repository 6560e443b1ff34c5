"""Entry point of the group `verl.plugins`: verl loads this module in every process that imports verl.

verl calls nothing here, it only imports, so this module installs its hooks on import. Each hook is a callback that
waits for a verl module to be imported and costs nothing until then:
- always: `validate_config`, where a drop-in command's settings are read in the driver (`prepare.py`), `run_ppo`, where
  entries of verl that do not validate are told that they are not served, and the import hooks of features;
- `VERL_PLATFORM=cpu`: what verl lacks to run without an accelerator (`cpu.py`, `cpu_patches.py`);
- `RL_ACCEL_ACTIVE`, which `prepare.py` sets for the Ray processes of a run that asked for rl_accel to the names of the
  features that are on: our trainer, and the named patches, of the spine and of these features.
verl swallows exceptions of plug-ins at debug level; the run then stops at the unknown trainer name `rl_accel_sync`.
"""

import os

from wrapt import register_post_import_hook

from rl_accel.feature import features, load
from rl_accel.hosts.verl import ACTIVE_ENV
from rl_accel.patching import HostPatch

RANKS = ("verl.workers.engine.fsdp.transformer_impl", "rl_accel.hosts.verl.fsdp2_ranks:RanksOnFSDP2")
"""Patch whose module imports verl itself, so that it is imported when it is needed."""


def _when_imported(module: str, function: str) -> None:
    """Call "module:function" with a module of verl after that was imported."""
    register_post_import_hook(lambda imported: load(function)(imported), module)


def patches() -> list[type[HostPatch]]:
    """Return the named patches of the features that are on in this process, and of every run."""
    from rl_accel.hosts.verl.patches import PATCHES

    names = os.environ.get(ACTIVE_ENV, "").split(",")
    of_features = [load(f.patches) for name, f in features().items() if name in names and f.patches]
    return [*PATCHES, *(patch for found in of_features for patch in found)]


_when_imported("verl.utils.config", "rl_accel.hosts.verl.prepare:hook_validate_config")
_when_imported("verl.trainer.main_ppo", "rl_accel.hosts.verl.prepare:hook_run_ppo")
for _feature in features().values():
    for _module, _function in _feature.import_hooks.items():
        _when_imported(_module, _function)

if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
    from rl_accel.hosts.verl import cpu, cpu_patches

    cpu.install()
    for _cpu_patch in cpu_patches.PATCHES:
        register_post_import_hook(_cpu_patch.apply, _cpu_patch.module_name())

if os.environ.get(ACTIVE_ENV):
    _when_imported("verl.trainer.ppo.v1.trainer_sync", "rl_accel.hosts.verl.trainer:registered")
    register_post_import_hook(lambda module: load(RANKS[1]).apply(module), RANKS[0])
    for _patch in patches():
        register_post_import_hook(_patch.apply, _patch.module_name())
