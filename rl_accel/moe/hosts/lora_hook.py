"""Compensators through vLLM's LoRA hook: the unfused baseline that needs no kernel of ours.

vLLM's TritonExperts adds a low-rank product of each expert to the results of both of its GEMMs where it has a
`MoELoRAContext`. An adapter that every token uses is a compensator: A is V, B is U. The weights beside it are those
without compensators, dequantized to the dtype of x, so this reads the bytes of an unquantized model and more; it is
here to be compared with.

Needs no LoRA configuration of the engine: `always_on` stands for it. Left out:
tensor and expert parallelism (pass the factors of the shard), two streams, tuned configurations. Ranks are padded to
the largest, which is at most 128 there.

Shape suffixes: E experts, R the largest rank, N rows, K weights of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from rl_accel.errors import MoEError
from rl_accel.kernels.moe_int3.layout import Factors, QuantizedMatrix
from rl_accel.kernels.moe_int3.reference import dequantize_factor

MAX_RANK = 128
"""Of vLLM's kernel, which holds the product with V in registers."""


@dataclass(frozen=True)
class LoraTensors:
    """What `MoELoRAContext` holds of a layer; the first dimension is the adapter, of which there is one."""

    w13_a: tuple[torch.Tensor, torch.Tensor]
    """[1, E, R, hidden] twice: gate and up have one V."""
    w13_b: tuple[torch.Tensor, torch.Tensor]
    """[1, E, intermediate, R]."""
    w2_a: tuple[torch.Tensor]
    """[1, E, R, intermediate]."""
    w2_b: tuple[torch.Tensor]
    """[1, E, hidden, R]."""


def dense_factors(
    factors: Factors, matrix: QuantizedMatrix, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return V [E, R, K] and U [E, N, R] of all matrices, zeros behind the rank of each.

    Raises:
        MoEError: if these are no compensators of `matrix`, or a rank is larger than the hook can serve.
    """
    factors.check_integrity(matrix)
    starts = factors.starts.tolist()
    ranks = factors.starts.diff().tolist()
    rank = max(1, *ranks)
    if rank > MAX_RANK:
        raise MoEError(f"vLLM's LoRA hook serves ranks of at most {MAX_RANK}; got {rank}: lower rl_accel.moe's ranks")
    codes_device = factors.v_codes.device
    v_RK = dequantize_factor(factors.v_codes.cpu(), factors.v_scales.cpu(), matrix.in_features)
    u_RN = dequantize_factor(factors.u_codes.cpu(), factors.u_scales.cpu(), matrix.out_features)
    v = torch.zeros(matrix.num_matrices, rank, matrix.in_features, dtype=dtype)
    u = torch.zeros(matrix.num_matrices, matrix.out_features, rank, dtype=dtype)
    for expert, (start, own) in enumerate(zip(starts, ranks, strict=False)):
        v[expert, :own] = v_RK[start : start + own].to(dtype)
        u[expert, :, :own] = u_RN[start : start + own].t().to(dtype)
    return v.to(codes_device), u.to(codes_device)


def lora_tensors(
    w13: QuantizedMatrix, w13_factors: Factors, w2: QuantizedMatrix, w2_factors: Factors, dtype: torch.dtype
) -> LoraTensors:
    """Return the tensors of the hook for one layer, of the dtype that the kernel multiplies in."""
    v13, u13 = dense_factors(w13_factors, w13, dtype)
    v2, u2 = dense_factors(w2_factors, w2, dtype)
    gate, up = (half.contiguous()[None] for half in u13.chunk(2, 1))
    return LoraTensors((v13[None], v13[None]), (gate, up), (v2[None],), (u2[None],))


def always_on(max_num_tokens: int, device: torch.device | str) -> Any:
    """Return the wrapper of LoRA kernels in which every token uses adapter 0, for engines without a LoRA configuration.
    It serves all batches of up to `max_num_tokens`, for kernels take the first entries of its tensors."""
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    config: Any = SimpleNamespace(max_loras=1, specialize_active_lora=False)
    wrapper = PunicaWrapperGPU(max_num_tokens, max_num_tokens, device, lora_config=config)
    wrapper.token_mapping_meta.prepare_tensors(torch.zeros(max_num_tokens, dtype=torch.int32, device=device))
    return wrapper


def lora_context(tensors: LoraTensors, top_k: int, wrapper: Any) -> Any:
    """Return the `MoELoRAContext` for `TritonExperts.set_lora_context`; `wrapper` is `always_on`'s."""
    from vllm.model_executor.layers.fused_moe.experts.lora_context import MoELoRAContext

    v2 = tensors.w2_a[0]
    return MoELoRAContext(
        w13_lora_a_stacked=tensors.w13_a,
        w13_lora_b_stacked=tensors.w13_b,
        w2_lora_a_stacked=tensors.w2_a,
        w2_lora_b_stacked=tensors.w2_b,
        adapter_enabled=torch.ones(2, dtype=torch.int32, device=v2.device),
        max_loras=1,
        top_k=top_k,
        w13_num_slices=2,
        fully_sharded=False,
        tp_rank=0,
        tp_size=1,
        local_num_experts=v2.shape[1],
        punica_wrapper=wrapper,
        use_tuned_config=False,
    )


def triton_experts(
    num_experts: int, top_k: int, hidden: int, intermediate: int, dtype: torch.dtype, device: str
) -> Any:
    """Return vLLM's `TritonExperts` for unquantized weights, outside of an engine."""
    from vllm.model_executor.layers.fused_moe import config as moe
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    settings = moe.FusedMoEConfig(
        num_experts=num_experts,
        experts_per_token=top_k,
        hidden_dim=hidden,
        intermediate_size=intermediate,
        num_local_experts=num_experts,
        num_logical_experts=num_experts,
        activation=MoEActivation.SILU,
        device=device,
        routing_method=moe.RoutingMethodType.Renormalize,
        moe_parallel_config=moe.FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=dtype,
        is_lora_enabled=True,
    )
    return TritonExperts(settings, moe.FUSED_MOE_UNQUANTIZED_CONFIG)


def apply(experts: Any, x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor):
    """Return what `TritonExperts.apply` computes for x [T, hidden], with the workspaces that it asks for."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    num_experts, rows, _ = w13.shape
    first, second, result = experts.workspace_shapes(
        len(x), rows, x.shape[1], ids.shape[1], num_experts, num_experts, None, MoEActivation.SILU
    )
    out = torch.empty(result, dtype=x.dtype, device=x.device)
    experts.apply(
        output=out,
        hidden_states=x,
        w1=w13,
        w2=w2,
        topk_weights=weights,
        topk_ids=ids,
        activation=MoEActivation.SILU,
        global_num_experts=num_experts,
        expert_map=None,
        a1q_scale=None,
        a2_scale=None,
        workspace13=torch.empty(first, dtype=x.dtype, device=x.device),
        workspace2=torch.empty(second, dtype=x.dtype, device=x.device),
        expert_tokens_meta=None,
        apply_router_weight_on_input=False,
    )
    return out
