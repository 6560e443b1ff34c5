"""The Triton kernel against its PyTorch specification.

On CPU the kernel runs in Triton's interpreter, in subprocesses of this file, because `TRITON_INTERPRET` must
be set before Triton is imported and vLLM must not see it. On CUDA the compiled kernel runs here, through the
dispatch of `rl_accel.kernels.gumbel_argmax.api`.
"""

import os
import subprocess
import sys

import pytest
import torch

VOCAB_SIZES = (1, 7, 63, 257, 1000, 2048, 2049, 32003)
SPECIAL = (
    "poisoned padding",
    "-inf and NaN rows",
    "masked tiles",
    "int32 positions",
    "transposed logits",
    "no rows",
)


def case(rows: int, vocab_size: int, dtype: torch.dtype, device: str):
    generator = torch.Generator().manual_seed(rows * 100_003 + vocab_size)
    logits = (torch.randn(rows, vocab_size, generator=generator) * 3).to(dtype)
    keys = torch.randint(-(1 << 63), (1 << 63) - 1, (rows,), generator=generator)
    positions = torch.randint(0, 1 << 20, (rows,), generator=generator)
    return logits.to(device), keys.to(device), positions.to(device)


def check(device: str, logits, keys, positions) -> None:
    from rl_accel.kernels.gumbel_argmax.reference import gumbel_argmax_reference
    from rl_accel.kernels.gumbel_argmax.triton import gumbel_argmax

    got, want = gumbel_argmax(logits, keys, positions), gumbel_argmax_reference(logits, keys, positions)
    assert got.dtype == torch.int64 and got.device == logits.device
    assert torch.equal(got, want), (logits.shape, logits.dtype, got, want)


def check_vocab(vocab_size: int, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for rows in range(1, 10) if vocab_size < 2000 else (1, 2, 9):
            check(device, *case(rows, vocab_size, dtype, device))


def check_special(name: str, device: str) -> None:
    logits, keys, positions = case(5, 5000, torch.float32, device)
    if name == "poisoned padding":  # rows are slices of a wider buffer whose other columns would win
        buffer = torch.full((5, 5011), torch.inf, device=device)
        buffer[:, :5000] = logits
        logits = buffer[:, :5000]
    elif name == "-inf and NaN rows":
        logits[0], logits[1], logits[2, ::2] = -torch.inf, torch.nan, torch.nan
        logits[3, 4999], logits[4, 7], logits[4, 4500] = torch.inf, torch.inf, torch.inf
    elif name == "masked tiles":  # what top-k leaves: the kernel skips the rest
        kept = logits.topk(3, dim=1).indices
        logits = torch.full_like(logits, -torch.inf).scatter(1, kept, logits.gather(1, kept))
    elif name == "int32 positions":
        positions = positions.to(torch.int32)
    elif name == "transposed logits":
        logits = logits.t().contiguous().t()
    else:
        logits, keys, positions = logits[:0], keys[:0], positions[:0]
    check(device, logits, keys, positions)


@pytest.mark.parametrize("what", [*map(str, VOCAB_SIZES), *SPECIAL])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; the interpreter is tested below")
def test_on_cuda(what):
    check_special(what, "cuda") if what in SPECIAL else check_vocab(int(what), "cuda")


@pytest.mark.parametrize("group", ["vocabularies", "special"])
def test_in_the_interpreter(group):
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, __file__, group], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    cases = VOCAB_SIZES if group == "vocabularies" else SPECIAL
    assert done.stdout.splitlines() == [f"ok {name}" for name in cases]


def main() -> None:
    for name in VOCAB_SIZES if sys.argv[1] == "vocabularies" else SPECIAL:
        check_vocab(name, "cpu") if isinstance(name, int) else check_special(name, "cpu")
        print("ok", name)


if __name__ == "__main__":
    main()
