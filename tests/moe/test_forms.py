"""What packed experts hold, and that kernels compute with it as the specification does, on both kinds of device.

The planes of the GPU go through Triton's interpreter, in a process of this file: `TRITON_INTERPRET` must be set before
Triton is imported.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch

from rl_accel.kernels.moe_int3 import reference
from rl_accel.moe.compress import Method, compress
from rl_accel.moe.hosts.forms import FORMS

EXPERTS, HIDDEN, SIZE = 3, 64, 64
BACKENDS = {"canonical": "cpp", "planes": "triton"}


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def difference(name: str) -> float:
    """Return the largest difference of a layer's results to the specification, of the largest result."""
    form, method = FORMS[name], Method(alternations=1)
    w13 = compress(gaussian(EXPERTS, 2 * SIZE, HIDDEN, seed=0), 3, 64, [2, 0, 5], method)  # ragged ranks
    w2 = compress(gaussian(EXPERTS, HIDDEN, SIZE, seed=1), 4, 32, [0, 0, 0], method)  # no compensators
    arguments: list = []
    for found in (w13, w2):
        parts, widths = form.tensors(found)
        assert set(parts) <= set(form.names) and len(widths) == 4
        arguments += form.arguments([parts.get(part) for part in form.names], widths)
    x, weights = gaussian(4, HIDDEN, seed=2), torch.rand(4, 2, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([[0, 1], [2, 0], [1, -1], [2, 1]], dtype=torch.int32)
    backend = importlib.import_module(f"rl_accel.kernels.moe_int3.{BACKENDS[name]}")
    wanted = reference.experts(x, weights, ids, w13.matrix, w13.factors, w2.matrix, w2.factors)
    return float((backend.experts(x, weights, ids, *arguments) - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", FORMS)
def test_kernels_are_given_what_was_compressed(name) -> None:
    if name == "planes":
        pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, __file__, name],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 2e-6


if __name__ == "__main__":
    print(difference(sys.argv[1]))
