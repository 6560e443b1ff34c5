"""Find and compose recipes: verl's own `ppo_trainer` configuration, a recipe on top, and the user's overrides.

`recipe=NAME` picks the file of the folder `recipes/NAME` that fits the machine, `recipe=NAME/SIZE` a file by name
(`cpu`, `gpu1`, `gpu8`, `nodes`), `recipe=PATH.yaml` a recipe of the user's own, which may build on the shipped ones.
`trainer=NAME` puts the training engine of `recipes/trainers/NAME` on top of any recipe, `trainer=PATH.yaml` one of the
user's own. `recipe=NAME+OVERLAY` puts a file of `recipes/overlays` on top, which switches a feature on and sets what
belongs to it.
"""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

from rl_accel.errors import ConfigError, VersionError

ROOT_CONFIG = "rl_accel_run"
"""Name under which Hydra is handed the list of recipe, overlays and trainer."""
OVERLAYS = "overlays"


def recipes_dir() -> Path:
    """Folder of the shipped recipes, installed or in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def verl_config_dir() -> Path:
    """Folder of verl's own configuration, found without importing verl, which reads its platform on import.

    Raises:
        VersionError: if verl is not installed.
    """
    spec = importlib.util.find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        raise VersionError("rl_accel needs verl; it is not installed")
    return Path(spec.submodule_search_locations[0]) / "trainer" / "config"


def names() -> list[str]:
    """Names for `recipe=`, with sizes."""
    root = recipes_dir()
    files = [path for path in root.glob("*/*.yaml") if path.stem != "base" and path.parent.name != OVERLAYS]
    return sorted(str(path.relative_to(root).with_suffix("")) for path in files)


def overlay_names() -> list[str]:
    """Names that may follow the recipe's, each after a `+`."""
    return sorted(path.stem for path in (recipes_dir() / OVERLAYS).glob("*.yaml"))


def resolve(recipe: str, has_gpu: bool) -> tuple[Path, str]:
    """Return (folder for Hydra, name of the configuration in it).

    Raises:
        ConfigError: if there is no such recipe; names the nearest one.
    """
    if recipe.endswith((".yaml", ".yml")):
        path = Path(recipe).expanduser().resolve()
        if not path.is_file():
            raise ConfigError(f"recipe={recipe}: no such file")
        return path.parent, path.stem
    known = names()
    folders = sorted({name.split("/")[0] for name in known})
    name = recipe if "/" in recipe else f"{recipe}/{'gpu1' if has_gpu else 'cpu'}"
    if name not in known:
        near = difflib.get_close_matches(recipe, [*folders, *known], n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"recipe={recipe}: no such recipe.{hint} Known: {', '.join([*folders, *known])}, or a path to a .yaml"
        )
    return recipes_dir(), name


def trainer_names() -> list[str]:
    """Names for `trainer=`."""
    return sorted(path.name for path in (recipes_dir() / "trainers").iterdir() if path.is_dir())


def resolve_trainer(trainer: str, on_cpu: bool) -> tuple[Path, str]:
    """Return (folder for Hydra to search, name of the configuration in it).

    Raises:
        ConfigError: if there is no such trainer; names the nearest one.
    """
    if trainer.endswith((".yaml", ".yml")):
        path = Path(trainer).expanduser().resolve()
        if not path.is_file():
            raise ConfigError(f"trainer={trainer}: no such file")
        return path.parent.parent, f"{path.parent.name}/{path.stem}"
    known = trainer_names()
    if trainer not in known:
        near = difflib.get_close_matches(trainer, known, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"trainer={trainer}: no such trainer.{hint} Known: {', '.join(known)}, or a path to a .yaml. "
            "Settings of verl's trainer are given one by one: trainer.KEY=VALUE"
        )
    return recipes_dir(), f"trainers/{trainer}/{'cpu' if on_cpu else 'gpu'}"


def split_overlays(recipe: str) -> tuple[str, list[str]]:
    """Return the recipe and the names of its overlays.

    Raises:
        ConfigError: for an unknown overlay; names the nearest one.
    """
    if Path(recipe).expanduser().is_file():
        return recipe, []
    recipe, *overlays = recipe.split("+")
    for overlay in overlays:
        if overlay not in overlay_names():
            near = difflib.get_close_matches(overlay, overlay_names(), n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"recipe={recipe}+{overlay}: no such overlay.{hint} Known: {', '.join(overlay_names())}")
    return recipe, overlays


def compose(recipe: str, overrides: list[str], has_gpu: bool) -> DictConfig:
    """Compose a configuration.

    Raises:
        ConfigError: for an unknown recipe or key, or a malformed override, with Hydra's own reason.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    recipe, overlays = split_overlays(recipe)
    folder, name = resolve(recipe, has_gpu)
    folders, parts = [verl_config_dir(), recipes_dir()], [f"/{name}", *(f"/{OVERLAYS}/{part}" for part in overlays)]
    trainers = [text.partition("=")[2] for text in overrides if text.startswith("trainer=")]
    overrides = [text for text in overrides if not text.startswith("trainer=")]
    for trainer in trainers[-1:]:
        size = name.split("/")[-1]
        # On a cluster `ray start` says how many devices a node has, so there is nothing to add to the recipe's ranks.
        on_cpu = (not has_gpu or size.startswith("cpu")) and not size.endswith("nodes")
        where, chosen = resolve_trainer(trainer, on_cpu)
        folders, parts = [*folders, where], [*parts, f"/{chosen}"]
    search = "hydra.searchpath=[{}]".format(",".join(f"'file://{path}'" for path in folders))
    ConfigStore.instance().store(name=ROOT_CONFIG, node={"defaults": [*parts, "_self_"]})
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(folder), version_base=None):
            # `++`: an unknown rl_accel key is then told by AccelConfig, which offers the nearest one.
            ours = [f"++{text}" if text.startswith("rl_accel.") else text for text in overrides]
            return _complete(hydra_compose(config_name=ROOT_CONFIG, overrides=[search, *ours]), recipe)
    except (HydraException, OmegaConfBaseException, YAMLError, UnicodeError, RecursionError) as error:
        raise ConfigError(_plain(error)) from error


def _complete(config: DictConfig, recipe: str) -> DictConfig:
    """Add what a recipe of the user's own may leave out: our block, and that its data are verl's own files."""
    if not isinstance(config.get("data"), DictConfig) or not isinstance(config.get("trainer"), DictConfig):
        raise ConfigError(
            f"recipe={recipe} makes no training: it has no data and trainer. Begin it with `# @package _global_` and "
            "`defaults: [/gsm8k_grpo/base, _self_]`"
        )
    defaults = {"source": "files", "path": None, "instruction": "", "train_size": None, "val_size": None}
    with open_dict(config):
        for name, value in defaults.items():
            if name not in config.data:
                config.data[name] = value
        if config.get("rl_accel") is None:
            config.rl_accel = OmegaConf.select(config, "actor_rollout_ref.rollout.custom.rl_accel") or {}
    return config


def _plain(error: Exception) -> str:
    """Hydra chains the useful sentence as the cause of a general one."""
    messages = []
    current: BaseException | None = error
    while current is not None:
        text = str(current).strip()
        if text and text not in messages:
            messages.append(text)
        current = current.__cause__
    return "\n".join(messages)
