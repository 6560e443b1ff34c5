"""Compiles a driver of C++ kernels with a sanitizer, without Python, and runs it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

FLAGS = ("-std=c++20", "-O1", "-g1", "-fno-sanitize-recover=all", "-pthread")
FLAGS += ("-Wall", "-Wextra", "-Werror", "-D_GLIBCXX_ASSERTIONS")
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=1:strict_string_checks=1:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def compiled(
    folder: Path, sanitizer: str, driver: Path, sources: Path, parts: Mapping[str, Sequence[str]], *flags: str
) -> Path:
    """Return the program of `driver` and of the parts in `sources`, each with flags of its own."""
    program, objects = folder / "driver", []
    for file, own in {driver: (), **{sources / f"{part}.cpp": own for part, own in parts.items()}}.items():
        objects.append(folder / f"{file.stem}.o")
        _call("g++", *FLAGS, *flags, f"-fsanitize={sanitizer}", *own, f"-I{sources}", "-c", file, "-o", objects[-1])
    _call("g++", "-pthread", f"-fsanitize={sanitizer}", *objects, "-o", program)
    return program


def skip_without_threads(folder: Path) -> None:
    """Skip where the thread sanitizer does not run, as on kernels whose addresses it does not know."""
    (folder / "main.cpp").write_text("int main() {}")
    trial = ["g++", "-fsanitize=thread", str(folder / "main.cpp"), "-o", str(folder / "main")]
    if subprocess.run(trial, capture_output=True).returncode or subprocess.run([folder / "main"]).returncode:
        pytest.skip("the thread sanitizer does not run here")


def run(driver: Path, *args: object) -> str:
    """Return what the driver prints; a sanitizer's finding fails the test."""
    command = [str(driver), *map(str, args)]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(command[1:])}\n{done.stderr[-5000:]}"
    assert "Sanitizer" not in done.stderr
    return done.stdout


def _call(*command: object) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
