"""DeepSpeed engines of the cases of test_attach.py, on a tiny model, and what is asked of them."""

from __future__ import annotations

import deepspeed
import deepspeed.runtime.bf16_optimizer as bf16_module
import deepspeed.runtime.zero.stage3 as stage3_module
import deepspeed.runtime.zero.stage_1_and_2 as stage12_module
import functorch.compile  # noqa: F401  DeepSpeed imports it with the first engine, in every rank
import torch
import torch.distributed as dist

from rl_accel.comm import SDP4BitConfig
from rl_accel.quickstart.tiny_gpt import MarkovText, TinyGPT, loss_of

TEXT = MarkovText(length=32)
ORIGINALS = (
    stage12_module.all_gather_dp_groups,
    bf16_module.all_gather_dp_groups,
    stage3_module.reduce_scatter_coalesced,
)


def four_bit(**changes) -> SDP4BitConfig:
    local_size = 2 if dist.get_world_size() % 2 == 0 else 1
    return SDP4BitConfig(**{"local_size": local_size, "bypass": "never", **changes})


def ds_config(stage: int, dtype: str = "bf16", ga: int = 1, grad_accum_dtype: str | None = None, **zero) -> dict:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": ga,
        "zero_optimization": {"stage": stage, **zero},
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    if grad_accum_dtype:
        config["data_types"] = {"grad_accum_dtype": grad_accum_dtype}
    return config


def make_engine(config: dict, seed: int = 0, build=deepspeed.initialize, layers: int = 1, width: int = 32):
    torch.manual_seed(seed)
    model = TinyGPT(width, layers, length=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return build(model=model, optimizer=optimizer, config=config)[0]


def train(engine, steps: int, first: int = 0, spoil=None) -> list[float]:
    """Returns the mean loss of every optimizer step."""
    rank, world_size, losses = dist.get_rank(), dist.get_world_size(), []
    for step in range(first, first + steps):
        total = 0.0
        for micro in range(engine.gradient_accumulation_steps()):
            seed = (step * engine.gradient_accumulation_steps() + micro) * world_size + rank
            loss = loss_of(engine, TEXT.batch(2, seed))
            scale = spoil(step) if spoil else 1.0
            engine.backward(loss * scale)
            engine.step()
            total += loss.detach()
        dist.all_reduce(total)
        losses.append(float(total) / world_size / engine.gradient_accumulation_steps())
    return losses


def weights_of(engine) -> torch.Tensor:
    """The held weights, float32, on this rank."""
    if engine.zero_optimization_stage() == 3:
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            return torch.cat([p.detach().float().flatten() for p in engine.module.parameters()]).clone()
    return torch.cat([p.detach().float().flatten() for p in engine.module.parameters()])


def same_on_all_ranks(x: torch.Tensor) -> bool:
    others = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(others, x)
    return all(torch.equal(x, other) for other in others)


def assert_untouched(engine) -> None:
    assert (
        stage12_module.all_gather_dp_groups,
        bf16_module.all_gather_dp_groups,
        stage3_module.reduce_scatter_coalesced,
    ) == ORIGINALS
    for name in ("step", "allreduce_and_scatter", "sdp4bit_handle"):
        assert name not in vars(engine.optimizer), name
    assert "allreduce_bucket" not in vars(engine)


ENGINES = {
    "stage1": ds_config(1),
    "stage1_fp32": ds_config(1, "fp32"),
    "stage1_ga": ds_config(1, ga=2, round_robin_gradients=True),
    "stage2": ds_config(2),
    "stage2_ga_overlap": ds_config(2, ga=2, overlap_comm=True),
    "stage2_small_buckets": ds_config(2, reduce_bucket_size=5000),
    "stage2_accumulates_fp32": ds_config(2, ga=2, grad_accum_dtype="fp32"),
    "bf16_optimizer": ds_config(1, grad_accum_dtype="fp32"),
    "bf16_optimizer_ga": ds_config(1, grad_accum_dtype="fp32", ga=2),
    "stage3": ds_config(3, stage3_param_persistence_threshold=0),
    "stage3_fp32_ga": ds_config(3, "fp32", ga=2, stage3_param_persistence_threshold=0),
}
