"""What a rank of bench_comm.py trains: TinyGPT in bfloat16 on DeepSpeed or on FSDP2, with one interface.

`device_ms` makes every layer wait so long in its forward pass and twice that in its backward pass, as if an accelerator
computed it and left the processor free: compute that communication can overlap. Cores that all ranks share are not.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch
import torch.distributed as dist

from rl_accel.comm import CommHandle, SDP4BitConfig, attach
from rl_accel.quickstart.tiny_gpt import TinyGPT, loss_of

LENGTH = 32


class Engine(Protocol):
    """A model and its optimizer on one rank."""

    num_parameters: int

    def backward(self, ids: torch.Tensor) -> torch.Tensor:
        """Run forward and backward passes; returns the loss."""

    def step(self) -> None: ...

    def attach(self, settings: dict[str, Any]) -> CommHandle: ...

    def set(self, options: dict[str, Any]) -> dict[str, Any]:
        """Set attributes of the host's optimizer; returns what they were."""


def make_model(width: int, layers: int, device_ms: float) -> TinyGPT:
    torch.manual_seed(0)
    model = TinyGPT(width, layers, length=LENGTH)
    if device_ms:
        for block in model.blocks:
            block.register_forward_pre_hook(lambda *_: time.sleep(device_ms / 1000))
            block.register_full_backward_pre_hook(lambda *_: time.sleep(2 * device_ms / 1000))
    return model


def make_optimizer(model: TinyGPT) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


class OnDeepSpeed:
    """ZeRO with the given options, clipped gradients."""

    def __init__(self, model: TinyGPT, zero: dict[str, Any], sequences: int):
        import deepspeed

        self.num_parameters = sum(weight.numel() for weight in model.parameters())
        config = {
            "train_micro_batch_size_per_gpu": sequences,
            "bf16": {"enabled": True},
            "gradient_clipping": 1.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"overlap_comm": False, **zero},
        }
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model), config=config)

    def backward(self, ids: torch.Tensor) -> torch.Tensor:
        loss = loss_of(self._engine, ids)
        self._engine.backward(loss)
        return loss

    def step(self) -> None:
        self._engine.step()

    def attach(self, settings: dict[str, Any]) -> CommHandle:
        return attach(self._engine, SDP4BitConfig(**settings))

    def set(self, options: dict[str, Any]) -> dict[str, Any]:
        optimizer = self._engine.optimizer
        before = {name: getattr(optimizer, name) for name in options}
        for name, value in options.items():
            setattr(optimizer, name, value)
        return before


class OnFSDP2:
    """`fully_shard` on every layer and on the root, resharded after forward passes, as verl does it.

    Args:
        reduce_dtype: of gradients on their way: float32 is verl's default, bfloat16 sends half.
    """

    def __init__(self, model: TinyGPT, reduce_dtype: str):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self.num_parameters = sum(weight.numel() for weight in model.parameters())
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=getattr(torch, reduce_dtype))
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        self._model, self._optimizer = model, make_optimizer(model)

    def backward(self, ids: torch.Tensor) -> torch.Tensor:
        loss = loss_of(self._model, ids)
        loss.backward()
        return loss

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def attach(self, settings: dict[str, Any]) -> CommHandle:
        return attach(self._model, SDP4BitConfig(**(settings | {"sharded_weights": True})), self._optimizer)

    def set(self, options: dict[str, Any]) -> dict[str, Any]:
        assert not options, "FSDP2 has none"
        return {}
