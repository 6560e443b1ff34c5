"""The C++ of the quantized experts under the address, undefined behavior and thread sanitizers, without Python.

`moe_int3_driver.cpp` makes random calls on buffers of exactly the right size; a sanitizer's finding ends it. Compiled
without optimization, which takes a fifth of the time (what is inlined is most of the code), and with AVX-512 only where
it runs: compiling it takes as long as all the rest.
"""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest

from .sanitizing import compiled, run, skip_without_threads

SOURCES = Path(__file__).parents[2] / "kernels" / "moe_int3" / "csrc"
CPU = Path("/proc/cpuinfo")
HAS_AVX512 = CPU.exists() and "avx512vl" in CPU.read_text()
PARTS = {"quantizer": [], "layers": [], "dispatch": [], "scalar": []}
if platform.machine() in ("x86_64", "AMD64"):  # as in CMakeLists.txt
    PARTS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    if HAS_AVX512:
        PARTS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def build(folder: Path, sanitizer: str) -> Path:
    driver = Path(__file__).with_name("moe_int3_driver.cpp")
    # A null pointer ends the driver anyway; checks of every access would take a tenth of compiling.
    flags = ["-ffp-contract=off", "-O0", "-fno-sanitize=null"] + ["-DWITHOUT_AVX512"] * (not HAS_AVX512)
    return compiled(folder, sanitizer, driver, SOURCES, PARTS, *flags)


@pytest.fixture(scope="session")
def driver(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("sanitized"), "address,undefined")


@pytest.fixture(scope="session")
def threaded_driver(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("threads")
    skip_without_threads(folder)
    return build(folder, "thread")


@pytest.mark.parametrize("seed", [1, 100001])
def test_random_calls(driver, seed) -> None:
    assert "scalar" in run(driver, "random", seed, 1.5)


def test_split_calls(driver) -> None:
    assert "calls" in run(driver, "threads", 1, 1)


def test_threads_do_not_race(threaded_driver) -> None:
    assert "calls" in run(threaded_driver, "threads", 2, 1)
