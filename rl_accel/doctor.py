"""python -m rl_accel.doctor [--json] [--model PATH] [--engine NAME=VALUE ...] [rl_accel.* setting ...]

Says whether rl_accel works here: versions, machine, and what is live, proved by importing verl and starting an engine
in processes of their own. Settings choose what is asked for; the default asks for exact sampling and ngram drafts.
`--engine` gives arguments of vLLM's engine, such as those of a command of your own. Exit status 1 if something that was
asked for is not live.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from rl_accel import machine
from rl_accel.config import AccelConfig
from rl_accel.errors import ConfigError, RLAccelError, VersionError
from rl_accel.feature import Check, Feature, features
from rl_accel.hosts import versions
from rl_accel.hosts.verl import ACTIVE_ENV, model_files, prepare
from rl_accel.probing import run_probe
from rl_accel.quickstart.deep import SHIPPED


def diagnose(accel: AccelConfig, model: str, engine: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return versions, machine, features and a list of checks, each `{"name", "ok", "detail"}`.

    Args:
        engine: arguments of vLLM's engine beside those that features ask for.
    """
    of_features = _check_features(accel, model, engine or {})
    checks = [_check_versions(), *_check_verl(accel), *(check for found in of_features.values() for check in found)]
    return {
        "versions": versions.report(),
        "machine": machine.describe(),
        "features": {name: _status(name, accel, of_features) for name in features()},
        "checks": [asdict(check) for check in checks],
        "ok": all(check.ok for check in checks),
    }


def _status(name: str, accel: AccelConfig, found: Mapping[str, Sequence[Check]]) -> str:
    """Return `off`, `live`, or `refused` with the first reason."""
    if not accel.settings[name].enabled:
        return "off"
    refused = [check for check in [*found.get("", []), *found.get(name, [])] if not check.ok]
    return f"refused: {refused[0].name} {refused[0].detail}".strip() if refused else "live"


def _check_versions() -> Check:
    try:
        versions.check()
    except VersionError as error:
        return Check("versions", False, str(error))
    return Check("versions", True, "all tested")


def _check_verl(accel: AccelConfig) -> list[Check]:
    env = {ACTIVE_ENV: ",".join(feature.name for feature in accel.enabled())}
    live, error = run_probe(
        "rl_accel.hosts.verl.probe", env=env | ({} if machine.has_gpu() else {"VERL_PLATFORM": "cpu"})
    )
    if live is None:
        return [Check("verl hooks", False, error)]
    return [Check(f"verl: {name}", ok) for name, ok in live.items()]


def _check_features(accel: AccelConfig, model: str, engine: Mapping[str, Any]) -> dict[str, list[Check]]:
    """Return feature -> checks; under "" what concerns all that act in a rollout engine."""
    try:
        for driver in prepare.drivers(accel):
            driver.check_engine_args(engine, machine.has_gpu())
    except ConfigError as refused:
        return {"": [Check("engine arguments", False, str(refused))]}
    probes = [(feature, feature.role("probe")(accel.settings[feature.name])) for feature in accel.enabled()]
    checks = {feature.name: _named(feature, probe.checks()) for feature, probe in probes}
    arguments = [model, json.dumps(prepare.engine_settings(accel))]
    with tempfile.TemporaryDirectory(prefix="rl_accel-") as folder:
        policy = model_files.text_config(model_files.read(model))
        asked = prepare.engine_args(accel, policy, Path(folder))
        arguments.append(json.dumps({**engine, **{name: value for name, (value, _) in asked.items()}}))
        found, error = run_probe("rl_accel.hosts.vllm.probe", arguments)
    if found is None:
        return {**checks, "": [Check("vLLM engine", False, error)]}
    live = found["live"]
    checks[""] = [Check("vLLM engine", bool(live), json.dumps(live))]
    for feature, probe in probes:
        if feature.engine:
            came_up = Check("live in the engine", bool(live.get("features", {}).get(feature.name)))
            checks[feature.name] += _named(feature, [came_up, *probe.engine_checks(found)])
    return checks


def _named(feature: Feature, checks: Sequence[Check]) -> list[Check]:
    return [replace(check, name=f"{feature.title}: {check.name}") for check in checks]


def _print(report: dict[str, Any]) -> None:
    for name, value in report["versions"].items():
        print(f"{name:18} {value or 'not installed'}")
    for name, value in report["machine"].items():
        print(f"{name:18} {value}")
    for name, status in report["features"].items():
        print(f"{name:18} {status}")
    for check in report["checks"]:
        print(f"{'ok  ' if check['ok'] else 'FAIL'}  {check['name']}  {check['detail']}".rstrip())


def _default_settings() -> list[str]:
    return [f"rl_accel.{name}.{setting}" for name, feature in features().items() for setting in feature.try_out]


def _engine_args(given: list[str]) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist(given))
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"--engine {' '.join(given)} cannot be read: {str(error).splitlines()[0]}") from error


def _chosen(settings: list[str]) -> Any:
    """Read `rl_accel.group.name=value` and return the block rl_accel.

    Raises:
        ConfigError: for anything else; the doctor proves what it was asked for, and nothing else.
    """
    for text in settings:
        if not text.startswith("rl_accel.") or "=" not in text:
            hint = f" Did you mean rl_accel.{text}?" if "=" in text else ""
            raise ConfigError(f"{text}: the doctor takes rl_accel.* settings, as {_default_settings()[0]}.{hint}")
    try:
        chosen = OmegaConf.to_container(OmegaConf.from_dotlist(settings), resolve=True)
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"{' '.join(settings)} cannot be read: {str(error).splitlines()[0]}") from error
    return chosen["rl_accel"]  # type: ignore[index, call-overload]


def _policy_for(accel: AccelConfig) -> str:
    """Return the folder of a policy of the package that has what the features act on."""
    wanted = [feature.try_policy for feature in accel.enabled() if feature.try_policy != "quickstart"]
    return str(SHIPPED[wanted[0] if wanted else "quickstart"])


def main(argv: list[str]) -> int:
    """Run the checks and print them; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m rl_accel.doctor", description=__doc__.split("\n\n")[1])
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--model", help="policy to start the engine with; default: one of the package that fits")
    parser.add_argument("--engine", action="append", default=[], metavar="NAME=VALUE", help="argument of vLLM's engine")
    parser.add_argument("settings", nargs="*", metavar="rl_accel.*=VALUE", default=_default_settings())
    arguments = parser.parse_args(argv)
    try:
        accel = AccelConfig.from_mapping(_chosen(arguments.settings))
        accel.check()
        engine = _engine_args(arguments.engine)
    except RLAccelError as error:
        print(f"rl_accel: {error}", file=sys.stderr)
        return 1
    report = diagnose(accel, arguments.model or _policy_for(accel), engine)
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        _print(report)
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
