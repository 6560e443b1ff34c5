"""python -m rl_accel.doctor [--json] [--model PATH] [rl_accel.* setting ...]

Says whether rl_accel works here: versions, machine, and what is live, proved by importing verl and starting an engine
in processes of their own. Settings choose what is asked for; the default asks for exact sampling and ngram drafts.
Exit status 1 if something asked for is not live.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from rl_accel import machine
from rl_accel.config import AccelConfig
from rl_accel.errors import ConfigError, RLAccelError, VersionError
from rl_accel.hosts import versions

DEFAULT_SETTINGS = ("rl_accel.sampling.exact=true", "rl_accel.draft.method=ngram")
POLICY = Path(__file__).parent / "quickstart" / "policy"
PROBE_TIMEOUT_S = 300


def diagnose(accel: AccelConfig, model: str) -> dict[str, Any]:
    """Return versions, machine and a list of checks, each `{"name", "ok", "detail"}`."""
    checks = [_check_versions(), *_check_verl(), *_check_engine(accel, model), *_check_comm(accel)]
    return {
        "versions": versions.report(),
        "machine": machine.describe(),
        "asked_for": {
            "sampling.exact": accel.sampling.exact,
            "draft.method": accel.draft.method,
            "comm.enable": accel.comm.enable,
        },
        "checks": checks,
        "ok": all(check["ok"] for check in checks),
    }


def _check(name: str, ok: bool, detail: str = "") -> dict[str, Any]:
    return {"name": name, "ok": bool(ok), "detail": detail}


def _check_versions() -> dict[str, Any]:
    try:
        versions.check()
    except VersionError as error:
        return _check("versions", False, str(error))
    return _check("versions", True, "all tested")


def _check_verl() -> list[dict[str, Any]]:
    env = {"RL_ACCEL_ACTIVE": "1"} | ({} if machine.has_gpu() else {"VERL_PLATFORM": "cpu"})
    live, error = _probe("rl_accel.hosts.verl.probe", [], env)
    if live is None:
        return [_check("verl hooks", False, error)]
    return [_check(f"verl: {name}", ok) for name, ok in live.items()]


def _check_engine(accel: AccelConfig, model: str) -> list[dict[str, Any]]:
    from rl_accel.hosts.verl.prepare import draft_settings, speculative_config

    settings = {
        "sampling": {"exact": accel.sampling.exact, "seed": accel.sampling.seed},
        "draft": draft_settings(accel),
    }
    arguments = [model, json.dumps(settings)]
    speculative = speculative_config(accel)
    if speculative is not None:
        arguments.append(json.dumps(speculative))
    found, error = _probe("rl_accel.hosts.vllm.probe", arguments, {})
    if found is None:
        return [_check("vLLM engine", False, error)]
    live = found["live"]
    checks = [_check("vLLM engine", bool(live), json.dumps(live))]
    if accel.sampling.exact:
        checks.append(_check("exact sampling live", live.get("exact_sampling", False)))
        checks.append(_check("same tokens alone and in a batch", found["batch_invariant"]))
    if speculative is not None:
        checks.append(_check("speculation self-test", live.get("self_test") == "passed"))
        drafted = (found["spec_counts"] or {}).get("num_draft_tokens", 0)
        checks.append(_check(f"drafting by {accel.draft.method}", drafted > 0, f"{drafted} tokens drafted"))
    return checks


def _check_comm(accel: AccelConfig) -> list[dict[str, Any]]:
    if not accel.comm.enable:
        return []
    live, error = _probe("rl_accel.hosts.deepspeed.probe", [], {})
    if live is None:
        return [_check("4-bit communication", False, error)]
    return [_check(f"4-bit communication: {name}", ok) for name, ok in live.items()]


def _probe(module: str, arguments: list[str], env: dict[str, str]) -> tuple[dict[str, Any] | None, str]:
    """Run a probe module; returns its JSON, or None and the end of what it printed."""
    command = [sys.executable, "-m", module, *arguments]
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            env={**os.environ, **env},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer within {PROBE_TIMEOUT_S} s"
    lines = result.stdout.strip().splitlines()
    if result.returncode == 0 and lines:
        return json.loads(lines[-1]), ""
    return None, "\n".join((result.stderr or result.stdout).strip().splitlines()[-5:])


def _print(report: dict[str, Any]) -> None:
    for name, value in report["versions"].items():
        print(f"{name:18} {value or 'not installed'}")
    for name, value in report["machine"].items():
        print(f"{name:18} {value}")
    for check in report["checks"]:
        print(f"{'ok  ' if check['ok'] else 'FAIL'}  {check['name']}  {check['detail']}".rstrip())


def _chosen(settings: list[str]) -> Any:
    """Read `rl_accel.group.name=value` and return the block rl_accel.

    Raises:
        ConfigError: for anything else; the doctor proves what it was asked for, and nothing else.
    """
    for text in settings:
        if not text.startswith("rl_accel.") or "=" not in text:
            hint = f" Did you mean rl_accel.{text}?" if "=" in text else ""
            raise ConfigError(f"{text}: the doctor takes rl_accel.* settings, as rl_accel.draft.method=das.{hint}")
    try:
        chosen = OmegaConf.to_container(OmegaConf.from_dotlist(settings), resolve=True)
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"{' '.join(settings)} cannot be read: {str(error).splitlines()[0]}") from error
    return chosen["rl_accel"]  # type: ignore[index, call-overload]


def main(argv: list[str]) -> int:
    """Run the checks and print them; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m rl_accel.doctor", description=__doc__.split("\n\n")[1])
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--model", default=str(POLICY), help="policy to start the engine with")
    parser.add_argument("settings", nargs="*", metavar="rl_accel.*=VALUE", default=list(DEFAULT_SETTINGS))
    arguments = parser.parse_args(argv)
    try:
        accel = AccelConfig.from_mapping(_chosen(arguments.settings))
    except RLAccelError as error:
        print(f"rl_accel: {error}", file=sys.stderr)
        return 1
    report = diagnose(accel, arguments.model)
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        _print(report)
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
