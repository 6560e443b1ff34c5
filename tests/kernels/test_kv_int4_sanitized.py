"""The C++ of the KV cache under the address, undefined behavior and thread sanitizers, without Python.

`kv_int4_driver.cpp` makes random calls on buffers of exactly the right size; a sanitizer's finding ends it. About 10 s,
and one to two compilations of half a minute each.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "kernels" / "kv_int4" / "csrc"
PARTS = {"kv_int4": [], "dispatch": [], "scalar": [], "avx2": [], "avx512": []}
if platform.machine() in ("x86_64", "AMD64"):  # as in CMakeLists.txt
    PARTS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    PARTS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
    PARTS["avx512"] += ["-mfma", "-mf16c"]
FLAGS = ["-std=c++20", "-O1", "-g1", "-ffp-contract=off", "-fno-sanitize-recover=all", "-pthread"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-D_GLIBCXX_ASSERTIONS"]
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=1:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def compiled(folder: Path, sanitizer: str) -> Path:
    driver, objects = folder / "driver", []
    files = {SOURCES / f"{part}.cpp": flags for part, flags in PARTS.items()}
    for file, flags in {Path(__file__).with_name("kv_int4_driver.cpp"): [], **files}.items():
        objects.append(folder / f"{file.stem}.o")
        call("g++", *FLAGS, f"-fsanitize={sanitizer}", *flags, f"-I{SOURCES}", "-c", file, "-o", objects[-1])
    call("g++", "-pthread", f"-fsanitize={sanitizer}", *objects, "-o", driver)
    return driver


def call(*command: object) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]


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


@pytest.mark.parametrize("seed", [1, 100001])
def test_random_calls(driver, seed) -> None:
    assert "scalar" in run(driver, "random", seed, 3)


def test_split_calls(driver) -> None:
    assert "calls" in run(driver, "threads", 1, 1)


def test_threads_do_not_race(threaded_driver) -> None:
    assert "calls" in run(threaded_driver, "threads", 2, 2)
