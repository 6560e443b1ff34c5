"""What tests that drive vLLM's samplers on CPU tensors share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def cpu_kernels() -> None:
    """Put vLLM's C++ kernels in the place of Triton's, as its CPU runner does in its constructor; where its kernel for
    recovered tokens cannot be called (0.24), repair that. `expand_batch_to_tokens` stays as it is."""
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    from rl_accel.hosts.vllm.cpu_repair import SampleRecoveredTokensPatch

    current_platform.import_kernels()
    CPUModelRunner._postprocess_triton(None)
    if SampleRecoveredTokensPatch.is_broken(torch.device("cpu")):
        SampleRecoveredTokensPatch.replace(rejection_sampler)
