"""The C++ of the suffix index under the address, undefined behavior and thread sanitizers, without Python.

`suffix_driver.cpp` makes random calls and checks the answers; a sanitizer's finding ends it. About 20 s, and one to two
compilations of half a minute each.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from .sanitizing import compiled, run, skip_without_threads

SOURCES = Path(__file__).parents[2] / "kernels" / "suffix" / "csrc"
PARTS = {part: [] for part in ("index", "drafting", "epochs", "budget", "inspection", "closed")}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def build(folder: Path, sanitizer: str) -> Path:
    return compiled(
        folder, sanitizer, Path(__file__).with_name("suffix_driver.cpp"), SOURCES, PARTS, "-D_GLIBCXX_SANITIZE_VECTOR"
    )  # indexes and the unused part of vectors, too


@pytest.fixture(scope="session")
def driver(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("sanitized"), "address,undefined")


@pytest.fixture(scope="session")
def threaded_driver(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("threads")
    skip_without_threads(folder)
    return build(folder, "thread")


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
