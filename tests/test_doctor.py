"""The doctor on this machine: everything that it asks for by default is live, and what is not live is exit status 1."""

import importlib.util
import json
import subprocess
import sys

import pytest


def doctor(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "rl_accel.doctor", *arguments], capture_output=True, text=True, timeout=400, check=False
    )


def test_what_is_asked_for_is_live():
    result = doctor(
        "--json", "rl_accel.sampling.exact=true", "rl_accel.draft.method=ngram", "rl_accel.comm.enable=true"
    )
    report = json.loads(result.stdout)
    assert result.returncode == 0, report["checks"]
    names = {check["name"] for check in report["checks"]}
    assert {"exact sampling live", "same tokens alone and in a batch", "drafting by ngram", "verl: trainer"} <= names
    assert {"4-bit communication: seams of BF16_Optimizer"} <= names
    assert {"4-bit communication: codec on cpu equals its specification"} <= names
    assert report["versions"]["verl"] == "0.9.1"


@pytest.mark.skipif(importlib.util.find_spec("arctic_inference") is not None, reason="arctic-inference is installed")
def test_what_cannot_come_up_is_a_failure():
    """vLLM refuses suffix decoding without its package: the engine does not start, and the doctor says so."""
    result = doctor("rl_accel.draft.method=suffix")
    assert result.returncode == 1
    assert "FAIL  vLLM engine" in result.stdout
    assert "arctic" in result.stdout.lower()


def test_a_misspelt_setting_is_named_before_anything_starts():
    result = doctor("rl_accel.draft.metod=ngram")
    assert result.returncode == 1
    assert "Did you mean 'method'?" in result.stderr
