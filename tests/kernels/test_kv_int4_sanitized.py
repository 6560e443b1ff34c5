"""The C++ of the KV cache under the address, undefined behavior and thread sanitizers, without Python.

`kv_int4_driver.cpp` makes random calls on buffers of exactly the right size; a sanitizer's finding ends it. About 10 s,
and one to two compilations of half a minute each.
"""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest

from .sanitizing import compiled, run, skip_without_threads

SOURCES = Path(__file__).parents[2] / "kernels" / "kv_int4" / "csrc"
PARTS = {"kv_int4": [], "dispatch": [], "scalar": [], "avx2": [], "avx512": []}
if platform.machine() in ("x86_64", "AMD64"):  # as in CMakeLists.txt
    PARTS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    PARTS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
    PARTS["avx512"] += ["-mfma", "-mf16c"]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def build(folder: Path, sanitizer: str) -> Path:
    return compiled(
        folder, sanitizer, Path(__file__).with_name("kv_int4_driver.cpp"), SOURCES, PARTS, "-ffp-contract=off"
    )


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
    assert "scalar" in run(driver, "random", seed, 3)


def test_split_calls(driver) -> None:
    assert "calls" in run(driver, "threads", 1, 1)


def test_threads_do_not_race(threaded_driver) -> None:
    assert "calls" in run(threaded_driver, "threads", 2, 2)
