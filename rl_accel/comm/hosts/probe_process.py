"""For the doctor: does 4-bit communication find its place in the installed DeepSpeed, and do codec backends agree?

Run as a module; prints one line of JSON, {check: whether it holds}.
"""

from __future__ import annotations

import json

import torch

from rl_accel.comm import dequantize, quantize
from rl_accel.comm.hosts.deepspeed.checks import HOST_SYMBOLS, changed_host_symbols
from rl_accel.hosts import versions
from rl_accel.hosts.deepspeed import load


def codec_agrees(device: str) -> bool:
    """Whether the backend of this device gives the bits of the specification, both ways."""
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).to(device)
    for hadamard in (False, True):
        ours = quantize(x, 4, 128, "stochastic", seed=1, hadamard=hadamard)
        reference = quantize(x, 4, 128, "stochastic", seed=1, hadamard=hadamard, backend="torch")
        back = [dequantize(reference, x.numel(), hadamard=hadamard, backend=name) for name in ("auto", "torch")]
        if not torch.equal(ours, reference) or not torch.equal(*back):
            return False
    return True


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    versions.check_deepspeed()
    load(device)
    live = {f"host symbols of {optimizer}": not changed_host_symbols(optimizer) for optimizer in HOST_SYMBOLS}
    print(json.dumps({**live, f"codec on {device} equals its specification": codec_agrees(device)}))


if __name__ == "__main__":
    main()
