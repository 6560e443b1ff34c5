"""The set-up script: a broken environment is made anew, a Python that cannot make one is named, two runs take turns."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "setup.sh"


@pytest.fixture
def bash(tmp_path):
    """Run bash with the functions of setup.sh on a project folder of the test's own."""
    (tmp_path / "scripts").mkdir()
    lines = SCRIPT.read_text().splitlines()
    assert lines[-1] == "setup"
    (tmp_path / "scripts" / "functions.sh").write_text("\n".join(lines[:-1]))

    def run(code, timeout=120):
        code = f"source {tmp_path}/scripts/functions.sh\n{code}"
        return subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=timeout, check=False)

    return run


def test_an_environment_without_pip_is_made_anew(bash, tmp_path):
    """`venv` of a Python without ensurepip fails and leaves a Python without pip, which the next run took for made."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / ".venv")], check=True)
    result = bash(f"make_venv {sys.executable}; $RL_ACCEL_ROOT/.venv/bin/python -m pip --version")
    assert result.returncode == 0, result.stderr
    assert str(tmp_path) in result.stdout


def test_an_environment_with_pip_is_kept(bash, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / ".venv")], check=True)
    (tmp_path / ".venv" / "mine").touch()
    assert bash(f"make_venv {sys.executable}").returncode == 0
    assert (tmp_path / ".venv" / "mine").exists()


def test_a_python_that_cannot_make_environments_is_named_and_leaves_none(bash, tmp_path):
    python = tmp_path / "python-without-venv"
    python.write_text(f'#!/bin/sh\n[ "$2" = venv ] && mkdir -p "$3/bin" && exit 1\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    result = bash(f"make_venv {python}")
    assert result.returncode == 1
    assert "cannot make a virtual environment with pip" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.skipif(shutil.which("flock") is None, reason="needs flock of util-linux")
def test_two_set_ups_take_turns(bash, tmp_path):
    order = bash(
        """
        (lock_setup; echo one begins; sleep 1; echo one ends; unlock_setup) &
        sleep 0.4
        lock_setup; echo two begins
        wait
        """
    )
    assert order.stdout.split("\n")[:3] == ["one begins", "one ends", "two begins"]
    assert "waiting for another set-up" in order.stderr
