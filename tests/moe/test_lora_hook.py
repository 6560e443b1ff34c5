"""Compensators as an adapter of vLLM's LoRA hook: tensors against a plain loop over the hook's contract."""

from __future__ import annotations

import pytest
import torch

from rl_accel.errors import MoEError
from rl_accel.kernels.moe_int3 import reference
from rl_accel.kernels.moe_int3.layout import Factors
from rl_accel.moe.hosts import lora_hook

HIDDEN, INTERMEDIATE, RANKS = 96, 64, [2, 0, 5]


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compensators(ranks: list[int], rows: int, length: int) -> Factors:
    v = reference.quantize_factor(normal(sum(ranks), length, seed=1), 2)
    u = reference.quantize_factor(normal(sum(ranks), rows, seed=2), 2)
    return Factors(*v, *u, torch.tensor([0, *ranks]).cumsum(0).int())


def layer():
    w13 = reference.quantize(normal(3, 2 * INTERMEDIATE, HIDDEN, seed=3), 3, 32, 1)
    w2 = reference.quantize(normal(3, HIDDEN, INTERMEDIATE, seed=4), 3, 32, 1)
    return w13, compensators(RANKS, 2 * INTERMEDIATE, HIDDEN), w2, compensators(RANKS[::-1], HIDDEN, INTERMEDIATE)


def add_lora(y: torch.Tensor, x: torch.Tensor, a: tuple, b: tuple, expert: int) -> None:
    """The hook's contract: slice j of a pair's row gets B_j (A_j x) of adapter 0."""
    width = b[0].shape[2]
    for j, (a_j, b_j) in enumerate(zip(a, b, strict=True)):
        y[:, j * width : (j + 1) * width] += x @ a_j[0, expert].T @ b_j[0, expert].T


def test_the_adapter_is_the_compensator() -> None:
    w13, f13, w2, f2 = layer()
    tensors = lora_hook.lora_tensors(w13, f13, w2, f2, torch.float32)
    assert tensors.w13_a[0].shape == (1, 3, 5, HIDDEN) and tensors.w2_b[0].shape == (1, 3, HIDDEN, 5)
    assert tensors.w13_b[1].shape == (1, 3, INTERMEDIATE, 5) and tensors.w2_a[0].shape == (1, 3, 5, INTERMEDIATE)
    for matrix, factors, a, b in ((w13, f13, tensors.w13_a, tensors.w13_b), (w2, f2, tensors.w2_a, tensors.w2_b)):
        x = normal(7, matrix.in_features, seed=5)
        for expert in range(3):
            y = x @ reference.dequantize(matrix)[expert].T
            plain = y.clone()
            add_lora(y, x, a, b, expert)
            want = reference.linear(x, matrix, factors, expert)
            assert (y - want).abs().max() < 1e-5 * want.abs().max()
            rank = int(factors.starts[expert + 1] - factors.starts[expert])
            assert torch.equal(y, plain) == (rank == 0)


def test_ranks_that_the_hook_cannot_serve() -> None:
    matrix = reference.quantize(normal(1, 64, 64, seed=6), 3, 64, 0)
    with pytest.raises(MoEError, match="at most 128; got 129"):
        lora_hook.dense_factors(compensators([129], 64, 64), matrix, torch.float16)
    v, u = lora_hook.dense_factors(compensators([0], 64, 64), matrix, torch.float16)
    assert v.shape == (1, 1, 64) and not v.any() and not u.any()


def test_vllm_takes_the_adapter() -> None:
    """Host symbols: its context has the fields that we set, its experts ask for it, its metadata serves every token.
    Its wrapper of LoRA kernels needs a GPU."""
    pytest.importorskip("vllm")
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta

    w13, f13, w2, f2 = layer()
    tensors = lora_hook.lora_tensors(w13, f13, w2, f2, torch.bfloat16)
    experts = lora_hook.triton_experts(3, 2, HIDDEN, INTERMEDIATE, torch.bfloat16, "cpu")
    assert experts.supports_lora()
    experts.set_lora_context(lora_hook.lora_context(tensors, 2, None))
    assert experts._lora_context.w2_lora_a_stacked is tensors.w2_a
    meta = LoRAKernelMeta.make(1, 16, "cpu")
    meta.prepare_tensors(torch.zeros(16, dtype=torch.int32))
    mapping, *_, lora_ids, no_lora, _ = meta.meta_args(9, False)
    assert mapping.tolist() == [0] * 9 and lora_ids[0] == 0 and not no_lora
