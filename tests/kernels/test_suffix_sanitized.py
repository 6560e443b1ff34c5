"""The C++ of the suffix index under the address, undefined behavior and thread sanitizers, without Python.

`suffix_driver.cpp` makes random calls and checks the answers; a sanitizer's finding ends it. About 20 s, and one to two
compilations of half a minute each.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "kernels" / "suffix" / "csrc"
FLAGS = ["-std=c++20", "-O1", "-g1", "-fno-sanitize-recover=all", "-Wall", "-Wextra", "-Werror", "-pthread"]
FLAGS += ["-D_GLIBCXX_ASSERTIONS", "-D_GLIBCXX_SANITIZE_VECTOR"]  # indexes and the unused part of vectors, too
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=1:strict_string_checks=1:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def compiled(folder: Path, sanitizer: str) -> Path:
    driver = folder / "driver"
    parts = [SOURCES / f"{part}.cpp" for part in ("index", "drafting", "epochs", "budget", "inspection", "closed")]
    files = [Path(__file__).with_name("suffix_driver.cpp"), *parts]
    command = ["g++", *FLAGS, f"-fsanitize={sanitizer}", f"-I{SOURCES}", *map(str, files), "-o", str(driver)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return driver


@pytest.fixture(scope="session")
def driver(tmp_path_factory) -> Path:
    return compiled(tmp_path_factory.mktemp("sanitized"), "address,undefined")


@pytest.fixture(scope="session")
def threaded_driver(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("threads")
    (folder / "main.cpp").write_text("int main() {}")
    trial = ["g++", "-fsanitize=thread", str(folder / "main.cpp"), "-o", str(folder / "main")]
    if subprocess.run(trial, capture_output=True).returncode or subprocess.run([folder / "main"]).returncode:
        pytest.skip("the thread sanitizer does not run here")
    return compiled(folder, "thread")


def run(driver: Path, *args: object) -> str:
    command = [str(driver), *map(str, args)]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(command[1:])}\n{done.stderr[-5000:]}"
    assert "Sanitizer" not in done.stderr
    return done.stdout


@pytest.mark.parametrize("seed", [1, 1001])
def test_random_calls(driver, tmp_path, seed) -> None:
    assert "runs" in run(driver, "random", seed, 3, tmp_path)


def test_texts_and_crowds_beyond_the_limits_of_packed_places(driver) -> None:
    run(driver, "extreme")


def test_changed_segment_files(driver, tmp_path) -> None:
    assert "taken" in run(driver, "files", 1, 3, tmp_path)


def test_threads_on_one_index(driver, tmp_path) -> None:
    assert "passes" in run(driver, "threads", 1, 2, tmp_path)


def test_threads_do_not_race(threaded_driver, tmp_path) -> None:
    assert "passes" in run(threaded_driver, "threads", 2, 3, tmp_path)
