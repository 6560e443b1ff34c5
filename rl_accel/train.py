"""python -m rl_accel.train recipe=gsm8k_grpo[+kvcache] [trainer=deepspeed] [any verl override] [rl_accel.* override]

Composes the recipe on top of verl's own configuration, checks it, says what is on, and hands it to verl's `main_ppo`.
From there on verl runs; rl_accel is in it through the hooks of `hosts/verl/plugin.py`.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback

from omegaconf import DictConfig, OmegaConf, open_dict

from rl_accel import data, flags, machine, processes, recipes
from rl_accel.errors import ConfigError, RLAccelError, RunFailedError
from rl_accel.hosts import versions
from rl_accel.hosts.verl import launch, prepare
from rl_accel.progress import Progress
from rl_accel.quickstart.deep import shipped_policy
from rl_accel.run_folder import RunFolder, default_path, is_disk_error, provenance

logger = logging.getLogger("rl_accel")


def main(argv: list[str]) -> int:
    """Run one training; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__.splitlines()[0]}\n\nrecipes: {', '.join(recipes.names())}")
        print(f"overlays: {', '.join(recipes.overlay_names())}")
        print(f"trainers: {', '.join(recipes.trainer_names())}")
        print(f"settings of rl_accel and their defaults (recipes set some):\n{flags.page()}" if argv else "")
        return 0 if argv else 2
    signal.signal(signal.SIGTERM, _interrupt)
    mark = processes.mark_children()
    processes.start_reaper(mark)
    try:
        return train(argv)
    except RLAccelError as error:
        print(f"rl_accel: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("rl_accel: interrupted", file=sys.stderr)
        return 130
    finally:
        _end_run(mark)


def train(overrides: list[str]) -> int:
    """Compose, check, train, summarize."""
    recipe, overrides = _split_recipe(overrides)
    gpu = machine.has_gpu()
    config = recipes.compose(recipe, overrides, gpu)
    accel = prepare.preflight(config)
    drivers = prepare.drivers(accel)
    engine = config.actor_rollout_ref.rollout.engine_kwargs.vllm
    machine.set_environment(config.trainer.device == "cpu", engine.get("kv_cache_memory_bytes"))
    folder = RunFolder(accel.run_dir or default_path(recipe))
    folder.open(resume=config.trainer.resume_mode != "disable" and bool(accel.run_dir))
    try:
        _fill_in(config, folder)
        folder.save_config(config, accel.accept_changes)
        _make_data(config, folder)
        prepare.check(config)
        _set_logging(folder)
        folder.update_info(
            **provenance(),
            recipe=recipe,
            arm="+".join(filter(None, (driver.arm() for driver in drivers))) or "none",
            seed=accel.seed,
            versions=versions.report(),
            machine=machine.describe(),
            finished=False,
        )
    except RLAccelError:
        folder.discard()
        raise
    except OSError as error:
        folder.discard()
        raise RunFailedError(
            f"{folder.path} could not be prepared: {error}. Start the same command again once that is mended"
        ) from error
    logger.info("recipe %s on %s, run folder %s", recipe, "GPU" if gpu else "CPU", folder.path)
    on = [driver.summary(config) for driver in drivers]
    logger.info("on: %s", ", ".join(filter(None, on)) or "nothing beside measurement")
    started = time.monotonic()
    try:
        _run_verl(config, folder)
        seconds = time.monotonic() - started
        folder.update_info(finished=True, seconds=round(seconds, 1))
        _summarize(folder, seconds)
    except Exception as error:
        raise _explained(error, folder) from error
    return 0


def _split_recipe(overrides: list[str]) -> tuple[str, list[str]]:
    chosen = [text.partition("=")[2] for text in overrides if text.startswith("recipe=")]
    if len(chosen) != 1:
        raise ConfigError(f"give exactly one recipe=NAME; known: {', '.join(recipes.names())}, or a path to a .yaml")
    return chosen[0], [text for text in overrides if not text.startswith("recipe=")]


def _fill_in(config: DictConfig, folder: RunFolder) -> None:
    """Put the run folder, the data files and the shipped policy into the configuration."""
    with open_dict(config):
        config.rl_accel.run_dir = str(folder.path)
        OmegaConf.update(config, prepare.BLOCK, OmegaConf.to_container(config.rl_accel, resolve=True), force_add=True)
        config.actor_rollout_ref.model.path = shipped_policy(config.actor_rollout_ref.model.path)
        if config.data.source != "files":
            config.data.train_files, config.data.val_files = map(str, data.paths(folder.path / "data"))


def _make_data(config: DictConfig, folder: RunFolder) -> None:
    if config.data.source != "files":
        data.build(
            config.data.source,
            folder.path / "data",
            path=config.data.path,
            instruction=config.data.instruction,
            train_size=config.data.train_size,
            val_size=config.data.val_size,
        )


def _run_verl(config: DictConfig, folder: RunFolder) -> None:
    progress = Progress(folder.metrics, config.trainer.total_training_steps)
    try:
        launch.run(config)
    finally:
        progress.close()


def _set_logging(folder: RunFolder) -> None:
    os.environ["VERL_FILE_LOGGER_PATH"] = str(folder.metrics)
    os.environ.setdefault("WANDB_DIR", str(folder.path))
    run_id = folder.read_info().get("wandb_run_id") or os.urandom(4).hex()
    folder.update_info(wandb_run_id=run_id)
    os.environ.setdefault("WANDB_RUN_ID", run_id)
    os.environ.setdefault("WANDB_RESUME", "allow")


def _explained(error: BaseException, folder: RunFolder) -> RLAccelError:
    """Return an error that tells the user what to do; the traceback goes into the run folder.

    Ray wraps an error in one of its own per process; ours among the causes is the one that tells most.
    """
    chain = _chain(error)
    ours = next((cause for cause in chain if isinstance(cause, RLAccelError)), None)
    kept = _keep_traceback(error, folder)
    if ours is not None:
        return ours
    disk = next((str(cause).strip().splitlines()[-1] for cause in chain if is_disk_error(cause)), None)
    if disk is not None:
        return RunFailedError(
            f"the disk of {folder.path} takes no more: {disk}. Free some space and start the same command again with "
            f"rl_accel.run_dir={folder.path}: it goes on from the last checkpoint"
        )
    last = str(chain[-1]).strip().splitlines() or ["no message"]
    return RunFailedError(f"training failed with {type(chain[-1]).__name__}: {last[-1]}\n{kept}")


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = getattr(current, "cause", None) or current.__cause__
    return chain


def _keep_traceback(error: BaseException, folder: RunFolder) -> str:
    text = "".join(traceback.format_exception(error))
    try:
        (folder.path / "error.log").write_text(text, encoding="utf-8")
    except OSError:
        return text  # nowhere to keep it, so it is shown
    return f"The traceback is in {folder.path / 'error.log'}"


def _summarize(folder: RunFolder, seconds: float) -> None:
    from rl_accel.compare.plot import plot_runs
    from rl_accel.compare.runs import load_run

    try:
        plot_runs([load_run(folder.path)], folder.path / "curves.png", title=folder.path.name)
    except Exception as error:  # the run finished: no picture is worth its exit status
        logger.warning("no curves.png: %s", error)
    logger.info(
        "finished in %.0f s. Run folder %s: metrics.jsonl, curves.png, wandb/, checkpoints/",
        seconds,
        folder.path,
    )


def _end_run(mark: str) -> None:
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
    ended = processes.end_survivors(mark)
    if ended:
        logger.info("ended %d processes that were left", ended)


def _interrupt(signum, frame) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
