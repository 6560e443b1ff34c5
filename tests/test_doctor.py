"""The doctor on this machine: everything that it asks for by default is live, and what is not live is exit status 1."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TOY = Path(__file__).parent / "feature" / "toy"
"""A feature of another package."""
ASKED = (
    "sampling.exact=true", "draft.method=ngram", "comm.enable=true", "kvcache.enable=true", "allow_lossy=true",
    "toy.enable=true",
)  # fmt: skip


def doctor(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "rl_accel.doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TOY), os.environ.get("PYTHONPATH", "")])},
    )


def test_what_is_asked_for_is_live():
    result = doctor("--json", *(f"rl_accel.{setting}" for setting in ASKED), "rl_accel.toy.size=7")
    report = json.loads(result.stdout)
    assert result.returncode == 0, report["checks"]
    names = {check["name"] for check in report["checks"]}
    assert {"exact sampling: live in the engine", "exact sampling: same tokens alone and in a batch"} <= names
    assert {"speculative decoding: drafting by ngram", "verl: trainer", "verl: patch RanksOnFSDP2"} <= names
    assert {"toy: size", "toy: live in the engine", "toy: engine answered", "verl: patch NamePatch"} <= names
    assert {"4-bit communication: host symbols of BF16_Optimizer"} <= names
    assert {"INT4 KV cache: kernels", "INT4 KV cache: pages of 4 bits"} <= names
    assert {"4-bit communication: codec on cpu equals its specification"} <= names
    assert report["versions"]["verl"] == "0.9.1"
    assert report["features"]["toy"] == report["features"]["comm"] == report["features"]["sampling"] == "live"
    assert report["features"]["trace"] == report["features"]["deepspeed"] == "off"


@pytest.mark.skipif(importlib.util.find_spec("arctic_inference") is not None, reason="arctic-inference is installed")
def test_what_cannot_come_up_is_a_failure():
    """vLLM refuses suffix decoding without its package: the engine does not start, and the doctor says so."""
    result = doctor("rl_accel.draft.method=suffix")
    assert result.returncode == 1
    assert "FAIL  vLLM engine" in result.stdout
    assert re.search(r"^draft +refused: vLLM engine", result.stdout, re.MULTILINE)
    assert "arctic" in result.stdout.lower()


def test_engine_arguments_that_ruin_a_run_are_refused_before_an_engine_starts():
    """vLLM's CPU build takes this dtype without an error and computes garbage."""
    result = doctor("--engine", "kv_cache_dtype=int4_per_token_head", "rl_accel.sampling.exact=true")
    assert result.returncode == 1
    assert "FAIL  engine arguments  kv_cache_dtype=int4_per_token_head: vLLM's CPU build" in result.stdout
    assert re.search(r"^sampling +refused: engine arguments", result.stdout, re.MULTILINE)


def test_a_misspelt_setting_is_named_before_anything_starts():
    result = doctor("rl_accel.draft.metod=ngram")
    assert result.returncode == 1
    assert "Did you mean 'method'?" in result.stderr
