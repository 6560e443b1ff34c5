"""The launcher of a server that drafts with a head which learns from its traffic, OpenAI-compatible.

    python -m rl_accel.speculator.serve --model FOLDER [--state FOLDER] [rl_accel.* settings] [options of vllm serve]

It is vLLM's own server: this checks the settings, adds them to vLLM's options and calls `vllm serve`. `--state` is a
folder that keeps the head over restarts, and stands for `rl_accel.speculator.state`. Further settings are written as
`rl_accel.speculator.width=64` or `rl_accel.draft.method=head`; exact sampling and `rl_accel.draft.method=auto` are on
unless they say otherwise. Guide: docs/speculator.md.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rl_accel import flags, machine, processes
from rl_accel.config import AccelConfig
from rl_accel.draft.config import HEAD_METHODS
from rl_accel.errors import ConfigError, RLAccelError
from rl_accel.hosts import versions
from rl_accel.hosts.verl import model_files
from rl_accel.hosts.verl.prepare import engine_args, engine_settings
from rl_accel.speculator.config import refuse_history, refuse_parallel
from rl_accel.speculator.hosts.serving import EXTENSION, MIDDLEWARE

DEFAULTS = {"sampling": {"exact": True}, "speculator": {"enable": True}}
ON = "rl_accel.sampling.exact=true and rl_accel.draft.method=auto"
TAKEN = {
    "speculative_config": "rl_accel.draft.* says how to draft",
    "spec_method": "rl_accel.draft.* says how to draft",
    "spec_model": "rl_accel.draft.* says how to draft",
    "spec_tokens": "rl_accel.draft.num_speculative_tokens=N says it",
    "worker_extension_cls": "the metrics of the speculator need that place",
    "headless": "the speculator's server is one process with its engine",
}
"""Options of `vllm serve` that nobody else may use -> why, or what to say instead."""
SHORT = {"-sc": "speculative_config"}
TRAINER = "rl_accel.speculator.process"
SHUTDOWN_S = 10
"""Seconds for running requests to end in after SIGTERM. With vLLM's own default, 0, it kills the engine with all its
children at once, and with them what the head has learned in the last minute."""
RUNNER_ENV = "VLLM_USE_V2_MODEL_RUNNER"


def main(argv: list[str]) -> int:
    """Serve until the process is told to end; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\nSettings and their defaults; for a server {ON}:\n{flags.page()}")
        return 0 if argv else 2
    try:
        ours, model, theirs = split(argv)
        accel = settings(ours)
        check(accel, model, theirs)
    except RLAccelError as error:
        print(f"rl_accel: {error}", file=sys.stderr)
        return 1
    _set_environment()
    with tempfile.TemporaryDirectory(prefix="rl_accel-") as folder:
        return _serve(accel, model, theirs, Path(folder))


def _serve(accel: AccelConfig, model: str, theirs: list[str], folder: Path) -> int:
    """Serve with settings that were checked; `folder` is for what the engine has to find when it starts."""
    try:
        args = vllm_args(accel, model, theirs, folder)
    except RLAccelError as error:
        print(f"rl_accel: {error}", file=sys.stderr)
        return 1
    processes.start_reaper(mark := processes.mark_children())
    try:
        args.dispatch_function(args)
    except KeyboardInterrupt:
        return 130
    finally:
        wait_for_trainers(mark)
    return 0


def split(argv: list[str]) -> tuple[dict[str, Any], str, list[str]]:
    """Return settings of rl_accel as nested mappings, the model, "" where vLLM's own options name it, and those.

    Raises:
        ConfigError: for a setting without a value.
    """
    dotted, taken, theirs = [], {"--state": "", "--model": ""}, []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name in taken:
            taken[name] = value if equals else next(words, "")
            if not taken[name]:
                raise ConfigError(f"{name} needs a folder")
        elif name.startswith("rl_accel."):
            if not equals:
                raise ConfigError(f"{name} needs a value: {name}=VALUE")
            dotted.append(word.removeprefix("rl_accel."))
        else:
            theirs.append(word)
    try:
        ours: Any = OmegaConf.to_container(OmegaConf.merge(DEFAULTS, OmegaConf.from_dotlist(dotted)), resolve=True)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"rl_accel settings cannot be read: {error}") from error
    if taken["--state"]:
        group = ours.setdefault("speculator", {})
        if isinstance(group, dict) and group.setdefault("state", taken["--state"]) != taken["--state"]:
            raise ConfigError(f"--state={taken['--state']} and rl_accel.speculator.state={group['state']} differ")
    return ours, taken["--model"], theirs


def settings(values: dict[str, Any]) -> AccelConfig:
    """Return the settings.

    Raises:
        ConfigError: where they are wrong, or ask for a server without a head.
    """
    accel = AccelConfig.from_mapping(values)
    accel.check()
    method = accel.settings["draft"].method
    if method not in HEAD_METHODS or not accel.settings["speculator"].enabled:
        raise ConfigError(
            f"rl_accel.draft.method={method}, rl_accel.speculator.enable={accel.settings['speculator'].enabled}: "
            f"nothing here would learn; leave them out, or use vllm serve. Methods that do: {', '.join(HEAD_METHODS)}"
        )
    if accel.settings["speculator"].head == "eagle3":
        refuse_history(method)
    return accel


def check(accel: AccelConfig, model: str, theirs: list[str]) -> None:
    """Check what takes no import of vLLM.

    Raises:
        ConfigError, VersionError: with the option to change.
    """
    versions.check()
    if not model and "--config" not in {word.partition("=")[0] for word in theirs}:
        model = theirs[0] if theirs and not theirs[0].startswith("-") else ""
        if not model:
            raise ConfigError("--model is missing: a folder, or the name of a model")
    if model and model_files.is_local(model) and not (Path(model).expanduser() / "config.json").is_file():
        raise ConfigError(f"--model={model}: no model there (config.json is missing)")
    words = [word.partition("=")[0] for word in theirs]
    refuse(SHORT.get(w, w.lstrip("-").partition(".")[0].replace("-", "_")) for w in words if w.startswith("-"))
    if accel.settings["speculator"].head == "eagle3":
        refuse_parallel(*_parallel_sizes(theirs))
    if os.environ.get(RUNNER_ENV, "0") != "0":
        raise ConfigError(f"{RUNNER_ENV}={os.environ[RUNNER_ENV]}: the speculator needs the V1 model runner; unset it")
    if state := accel.settings["speculator"].state:
        try:
            os.makedirs(state, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--state={state}: no folder can be made there: {error}") from error
        if not os.access(state, os.W_OK | os.X_OK):
            raise ConfigError(f"--state={state}: the folder cannot be written to")


def _parallel_sizes(theirs: list[str]) -> tuple[int, int]:
    """Return the sizes of tensor and pipeline parallel that options of vLLM ask for."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-tp", "--tensor-parallel-size", type=int, default=1, dest="tensor")
    parser.add_argument("-pp", "--pipeline-parallel-size", type=int, default=1, dest="pipeline")
    try:
        found, _ = parser.parse_known_args(theirs)
    except argparse.ArgumentError:
        return 1, 1  # vLLM says what is wrong
    return found.tensor, found.pipeline


def refuse(names: Iterable[str]) -> None:
    """Raise ConfigError for an option of vLLM that is not free."""
    for name in names:
        if name in TAKEN:
            raise ConfigError(f"--{name.replace('_', '-')} cannot be set here: {TAKEN[name]}")


def vllm_args(accel: AccelConfig, model: str, theirs: list[str], folder: Path) -> Any:
    """Return what vLLM makes of its options, with ours among them. vLLM itself exits on options that it does not know.

    Raises:
        ConfigError: for one that is not free.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="python -m rl_accel.speculator.serve")
    command.subparser_init(parser.add_subparsers(dest="subparser")).set_defaults(dispatch_function=command.cmd)
    args = parser.parse_args(["serve", *([model] if model else []), *theirs])
    command.validate(args)
    refuse(name for name in TAKEN if getattr(args, name, None))  # a file of options may name them
    additional = args.additional_config or {}
    if not isinstance(additional, dict) or "rl_accel" in additional:
        raise ConfigError("--additional-config must be a mapping without rl_accel; write that as rl_accel.*=VALUE")
    if (args.api_server_count or 1) != 1:
        raise ConfigError(f"--api-server-count={args.api_server_count}: one server can tell the metrics, not several")
    args.api_server_count = 1
    args.additional_config = {**additional, "rl_accel": engine_settings(accel)}
    if accel.settings["speculator"].head == "eagle3":  # a file of options may name them
        refuse_parallel(args.tensor_parallel_size, args.pipeline_parallel_size)
    policy = model_files.text_config(model_files.read(args.model_tag or args.model))
    for name, (value, _) in engine_args(accel, policy, folder).items():
        setattr(args, name, value)
    args.worker_extension_cls = EXTENSION
    args.middleware = [*args.middleware, MIDDLEWARE]
    args.shutdown_timeout = args.shutdown_timeout or SHUTDOWN_S
    return args


def wait_for_trainers(mark: str) -> None:
    """Give trainers the time to write their state; the engine that they served is gone, and that ends them."""
    trainers = []
    for process in processes.survivors(mark):
        with contextlib.suppress(psutil.Error):
            if TRAINER in process.cmdline():
                trainers.append(process)
    psutil.wait_procs(trainers, timeout=SHUTDOWN_S)


def _set_environment() -> None:
    """What the user set stays."""
    defaults = {RUNNER_ENV: "0", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    if not machine.has_gpu():
        defaults |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # vLLM's CPU platform gives the worker a process of its own with it
            "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
