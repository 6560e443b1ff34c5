"""May the run folder of an arm be gone on with, or taken as it is? Only if it was made with the settings asked for.

What counts is what the settings were resolved to, config.yaml: it also tells that a recipe was edited since, or that
another version of rl_accel or verl has other defaults. Where it is missing, run.json's command decides. Costs about
two seconds for a folder that holds a run, for composing the configuration anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rl_accel import resuming
from rl_accel.compare.reading import read_json_object, reading
from rl_accel.config import leaves
from rl_accel.errors import CompareError

_RECORDS = ("metrics.jsonl", "tokens", "checkpoints", "config.yaml")
"""What a run leaves in its folder once its settings matter."""
_SHOWN = 4
_PROGRAM = "rl_accel.train"


def holds_run(run_dir: Path) -> bool:
    """Whether something in the folder depends on the settings of the run that made it."""
    return any((run_dir / name).exists() for name in _RECORDS)


def is_finished(run_dir: Path) -> bool:
    """Whether the run says that it came to its end."""
    info = run_dir / "run.json"
    return info.exists() and read_json_object(info).get("finished") is True


def check_same_settings(run_dir: Path, settings: Sequence[str]) -> None:
    """Refuse a folder that holds a run of other settings.

    Args:
        run_dir: folder of the run; may hold none, or not exist
        settings: overrides asked for, without `rl_accel.run_dir`

    Raises:
        CompareError: the run had other settings, does not say which, or its files are damaged.
    """
    if not holds_run(run_dir):
        return
    changed = _config_changes if (run_dir / "config.yaml").exists() else _command_changes
    if what := changed(run_dir, settings):
        raise CompareError(f"{run_dir} holds a run {what}. Give another --out, or delete the folder")


def _config_changes(run_dir: Path, settings: Sequence[str]) -> str:
    was = read_config(run_dir / "config.yaml")
    now = dict(leaves(_resolve(settings, run_dir, was)))
    changed = [key for key in was.keys() | now.keys() if was.get(key) != now.get(key)]
    changed.sort(key=lambda key: (key.count("."), key))  # what a user sets comes before what follows from it
    if not changed:
        return ""
    shown = "; ".join(f"{key} was {was.get(key)!r:.60}, is {now.get(key)!r:.60}" for key in changed[:_SHOWN])
    more = f"; and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    return f"with other settings: {shown}{more}"


def _command_changes(run_dir: Path, settings: Sequence[str]) -> str:
    command = read_json_object(run_dir / "run.json").get("command") if (run_dir / "run.json").exists() else None
    if not isinstance(command, list) or _PROGRAM not in command:
        return "that does not say how it was started (no config.yaml, no command in run.json)"
    ran = [str(part) for part in command[command.index(_PROGRAM) + 1 :]]
    ran = [part for part in ran if part.partition("=")[0] != "rl_accel.run_dir"]
    if ran == list(settings):
        return ""
    return f"with other settings. It ran {' '.join(ran)}; asked for is {' '.join(settings)}"


def _resolve(settings: Sequence[str], run_dir: Path, was: dict[str, Any]) -> dict[str, Any]:
    """What the settings mean today, with the paths that `train` fills in taken from the run."""
    from omegaconf import OmegaConf, open_dict

    from rl_accel import recipes

    with reading(" ".join(settings), "a list of settings that can be resolved"):
        (recipe,) = [text.partition("=")[2] for text in settings if text.startswith("recipe=")]
        overrides = [text for text in settings if not text.startswith("recipe=")]
        # The machine that compares may be another one than the machine that trained.
        config = recipes.compose(recipe, overrides, has_gpu=was.get("trainer.device") != "cpu")
        filled = ["rl_accel.run_dir"]
        if str(OmegaConf.select(config, "actor_rollout_ref.model.path")).startswith("quickstart"):
            filled.append("actor_rollout_ref.model.path")
        if OmegaConf.select(config, "data.source") != "files":
            filled += ["data.train_files", "data.val_files"]
        with open_dict(config):
            for key in filled:
                OmegaConf.update(config, key, was.get(key))
        resolved: Any = OmegaConf.to_container(config, resolve=True)
        return resolved


def read_config(path: Path) -> dict[str, Any]:
    """Read config.yaml as full name -> value.

    Raises:
        CompareError: it is not such a file.
    """
    with reading(path, "a configuration"):
        return resuming.read_config(path)
