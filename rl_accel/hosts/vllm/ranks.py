"""Which rank of a tensor-parallel group says what vLLM uses."""

from __future__ import annotations

from typing import Any


def is_output_rank(vllm_config: Any) -> bool:
    """Whether vLLM uses the sampled tokens and drafts of this rank."""
    if vllm_config.parallel_config.tensor_parallel_size == 1:
        return True
    from vllm.distributed import get_tensor_model_parallel_rank

    return get_tensor_model_parallel_rank() == 0
