"""The model of an H100 and H200 by bytes: against figures worked out by hand, and against what vLLM counted."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "simulate_kv.py"


@pytest.fixture(scope="module")
def simulate_kv():
    spec = importlib.util.spec_from_file_location("simulate_kv", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["simulate_kv"] = module
    spec.loader.exec_module(module)
    return module


def test_bytes_are_those_that_vllm_counted(simulate_kv) -> None:
    """vLLM's engine on a CPU reported 1927 blocks for the memory of 512 of bfloat16, at a head size of 128."""
    model = simulate_kv.Model(0.0, 2, 8, 128)
    bf16, ours = [simulate_kv.token_bytes(model, kind) for kind in ("bf16", "int4")]
    assert 512 * bf16 // ours == 1927
    assert simulate_kv.token_bytes(model, "vllm_int4") == ours < simulate_kv.token_bytes(model, "fp8") == bf16 // 2
    assert simulate_kv.token_bytes(model, "int4_int8") == ours + 8 * 128


def test_a_step_by_hand(simulate_kv) -> None:
    gpu, model = simulate_kv.Gpu(100e9, 1e12), simulate_kv.Model(10e9, 10, 4, 128)
    # 60 GB for requests of 1024 tokens, 20,480 bytes a token: 2861.02; with 4 bits 5440 bytes
    assert simulate_kv.fitting_requests(gpu, model, "bf16", 1020, 0.9, 10e9) == 2861
    assert simulate_kv.fitting_requests(gpu, model, "int4", 1024, 0.9, 10e9) == 10770
    assert simulate_kv.fitting_requests(gpu, model, "bf16", 1024, 0.2, 10e9) == 0
    assert simulate_kv.step_seconds(gpu, model, "bf16", 1000, 100, 0.5, 0.1) == pytest.approx(0.04 + 4.096e-3)
    assert simulate_kv.step_seconds(gpu, model, "int4", 1000, 100, 0.5, 0.1) == pytest.approx(0.04 + 5.44e-3)


def test_rows_and_what_they_are_compared_with(tmp_path: Path) -> None:
    result = tmp_path / "rows.json"
    options = ["--gpu", "h100", "--model", "8b", "32b", "--context", "32768", "--kv-share", "0.75"]
    command = [sys.executable, SCRIPT, *options, "--json", result]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(result.read_text())}
    assert rows.pop("kv_sim.conditions")["kv_share"] == 0.75
    assert {name.split(".")[2] for name in rows} == {"8b"}, "beside 32B weights an H100 has no room for one request"
    for what in ("requests", "step_ms", "tokens_per_s"):
        base, ours = [rows[f"kv_sim.h100.8b.32768.{kind}.{what}"] for kind in ("bf16", "int4_int8")]
        assert base["ratio"] == 1.0 and ours["incumbent"] == base["value"]
        assert 1.5 < ours["ratio"] < 3.77
    assert rows["kv_sim.h100.8b.32768.bf16.step_ms"]["bound"] == pytest.approx(
        0.75 * rows["kv_sim.h100.8b.32768.bf16.step_ms"]["value"]
    )


def test_the_method_predicts_calls_from_others(simulate_kv) -> None:
    def row(name: str, value: float, incumbent: float, bound: float) -> dict:
        return {"name": f"kv.decode_us.{name}", "value": value, "incumbent": incumbent, "bound": bound}

    rows = [row("d128.g4.512.avx512", 20.0, 60.0, 10.0), row("d128.g4.4096.avx512", 40.0, 200.0, 25.0),
            row("d64.g4.512.avx512", 9.0, 9.0, 9.0), {"name": "kv.store_ns.d64.16.avx512"}]  # fmt: skip
    assert simulate_kv.predictions(rows) == [
        ("kv.decode_us.d128.g4.4096.avx512 (avx512)", 50.0, 40.0),
        ("kv.decode_us.d128.g4.4096.avx512 (stock)", pytest.approx(150.0), 200.0),
    ]
