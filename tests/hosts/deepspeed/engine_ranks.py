"""One rank of test_attach.py: DeepSpeed engines with and without 4-bit communication, on real gloo.

Each case is a function; the cases named on the command line run one after the other in one process group, because
importing DeepSpeed takes longer than all of them.
"""

from __future__ import annotations

import argparse
import base64
import importlib
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import deepspeed
import deepspeed.runtime.bf16_optimizer as bf16_module
import deepspeed.runtime.zero.stage3 as stage3_module
import deepspeed.runtime.zero.stage_1_and_2 as stage12_module
import functorch.compile  # noqa: F401  DeepSpeed imports it with the first engine, in every rank
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import logger, safe_get_full_fp32_param, safe_set_full_fp32_param

from rl_accel.comm import SDP4BitConfig, attach, initialize
from rl_accel.errors import CommError, ConfigError, NotLiveError, VersionError
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


def make_engine(config: dict, seed: int = 0, build=deepspeed.initialize):
    torch.manual_seed(seed)
    model = TinyGPT(width=32, layers=1, length=32)
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


def case_sixteen_bits_is_deepspeed() -> None:
    """With 16 bits on every hop, routing alone is ours: weights after 3 steps are DeepSpeed's up to bfloat16 sums."""
    for name, config in ENGINES.items():
        plain, ours = make_engine(config), make_engine(config)
        start = weights_of(plain)
        handle = attach(ours, four_bit(intra_bits=16, inter_bits=16, weight_bits=16))
        first = train(plain, 1), train(ours, 1)
        # The norm sees factors that clipping and Adam would hide.
        norms = [float(engine.get_global_grad_norm()) for engine in (plain, ours)]
        assert abs(norms[1] / norms[0] - 1) < 0.01, (name, norms)
        losses = [first[i] + train(engine, 2, first=1) for i, engine in enumerate((plain, ours))]
        moved, apart = weights_of(plain) - start, weights_of(ours) - weights_of(plain)
        # Adam's first steps are lr * sign(gradient): where a gradient is next to nothing, rounding decides the sign.
        assert apart.norm() < 0.25 * moved.norm(), (name, float(apart.norm() / moved.norm()))
        assert abs(losses[0][-1] - losses[1][-1]) < 2e-3, (name, losses)
        assert same_on_all_ranks(weights_of(ours)), name
        assert handle.stats()["steps"] == 3
        handle.detach()


def case_four_bits_train() -> None:
    """Replicas are equal bit for bit after every step; the loss follows the plain one; bytes are those of the codec."""
    for name, config in ENGINES.items():
        plain, ours = make_engine(config), make_engine(config)
        handle = attach(ours, four_bit())
        plain_losses, losses = train(plain, 1), []
        for step in range(10):
            losses += train(ours, 1, first=step)
            if step == 0:
                norms = [float(engine.get_global_grad_norm()) for engine in (plain, ours)]
                assert abs(norms[1] / norms[0] - 1) < 0.05, (name, norms)
                plain_losses += train(plain, 9, first=1)
            assert same_on_all_ranks(weights_of(ours)), (name, step)
        assert max(abs(a - b) for a, b in zip(plain_losses, losses, strict=True)) < 0.03, (name, plain_losses, losses)
        stats = handle.stats()
        handle.detach()
        assert stats["steps"] == 10
        if dist.get_world_size() == 1:
            assert not stats["gradient_values"]
            continue
        assert stats["gradients_quantized"]
        micro_steps = 20 if "ga" in name and "stage1" not in name and "bf16" not in name else 10
        if "accumulates" in name:
            micro_steps = 20
        numel = sum(getattr(p, "ds_numel", p.numel()) for p in ours.module.parameters())
        assert stats["gradient_values"] >= numel * micro_steps, (name, stats)
        assert stats["weight_values"] >= (0 if "stage3" in name else numel * 10), (name, stats)
        crossing = stats["gradient_values"] / stats["local_size"] * (stats["num_nodes"] - 1) / stats["num_nodes"]
        if crossing and "small" not in name and "bf16_optimizer" not in name and "stage3" not in name:
            assert 4.25 <= 8 * stats["gradient_inter_bytes"] / crossing < 4.6, (name, stats)


def case_detach_restores() -> None:
    for name in ("stage2", "bf16_optimizer", "stage3"):
        engine = make_engine(ENGINES[name])
        assert_untouched(engine)
        handle, second = attach(engine, four_bit()), make_engine(ENGINES[name])
        other = attach(second, four_bit())
        train(engine, 1)
        handle.detach()
        other.detach()
        assert_untouched(engine)
        before = handle.stats()
        train(engine, 1)
        assert handle.stats() == before
        attach(engine, four_bit()).detach()

        engine.backward(loss_of(engine, TEXT.batch(2, dist.get_rank())))
        handle = attach(engine, four_bit())  # in the middle of a step, whose gradients are reduced already
        engine.step()
        train(engine, 2)
        assert bool(handle.stats()["gradient_values"]) == (dist.get_world_size() > 1)
        handle.detach()


def case_resume_is_bit_equal() -> None:
    """Stochastic rounding, bypass and weights go on where they stopped."""
    settings = four_bit(gradient_rounding="stochastic")
    for name in ("stage1", "stage2_ga_overlap", "bf16_optimizer", "stage3"):
        folder = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [None]
        dist.broadcast_object_list(folder)
        whole = make_engine(ENGINES[name])
        handle = attach(whole, settings)
        train(whole, 3)
        whole.save_checkpoint(folder[0], client_state={"sdp4bit": handle.state_dict()})
        saved = weights_of(whole)
        train(whole, 3, first=3)

        resumed = make_engine(ENGINES[name], seed=1)
        _, client = resumed.load_checkpoint(folder[0])
        again = attach(resumed, settings)
        again.load_state_dict(client["sdp4bit"])
        assert torch.equal(weights_of(resumed), saved), name
        train(resumed, 3, first=3)
        assert torch.equal(weights_of(resumed), weights_of(whole)), name
        handle.detach()
        again.detach()


def case_a_skipped_step_sends_no_weights() -> None:
    """An infinite gradient on one rank reaches the overflow check of all; weights stay, nothing of them is sent."""
    for name in ("stage1", "stage2", "bf16_optimizer"):  # DeepSpeed has no fp16 on CPU
        config = {**ENGINES[name], "bf16": {"enabled": True, "check_grad_overflow": True}}
        for bad in (float("inf"), float("nan")):
            engine = make_engine(config)
            handle = attach(engine, four_bit())
            train(engine, 2)
            before, sent = weights_of(engine), handle.collectives.traffic.weight_values
            train(engine, 1, first=2, spoil=lambda step: bad if dist.get_rank() == 0 else 1.0)  # noqa: B023
            assert engine.optimizer.overflow, (name, bad)
            assert torch.equal(weights_of(engine), before), (name, bad)
            assert handle.collectives.traffic.weight_values == sent
            train(engine, 1, first=3)
            assert not torch.equal(weights_of(engine), before)
            assert same_on_all_ranks(weights_of(engine))
            handle.detach()


def case_a_search_for_the_loss_scale_is_no_try() -> None:
    """Twelve skipped steps in a row, as when a loss scale is searched: no weights were sent, none were timed. DeepSpeed
    has no fp16 on most CPUs; its skipped step is the same for a bfloat16 gradient that overflows."""
    if dist.get_world_size() == 1:
        return
    engine = make_engine({**ENGINES["stage2"], "bf16": {"enabled": True, "check_grad_overflow": True}})
    handle = attach(engine, four_bit(bypass="auto"))
    for step in range(24):
        train(engine, 1, first=step, spoil=lambda step: float("inf") if step < 12 else 1.0)
        assert engine.optimizer.overflow == (step < 12)
        stats = handle.stats()
        assert ("weights_plain_s" in stats) == (step >= 12 + 5), (step, stats)
    assert min(stats[f"{what}_{way}_s"] for what in ("gradients", "weights") for way in ("quantized", "plain")) > 0
    assert same_on_all_ranks(weights_of(engine))
    handle.detach()


def case_a_slow_rank_is_not_a_slow_link() -> None:
    """Rank 1 comes half a second late to every step. Waiting for it is in no time that decides; it was half of it."""
    if dist.get_world_size() != 2:
        return
    engine = make_engine(ENGINES["stage2"])
    handle = attach(engine, four_bit(bypass="auto"))
    for step in range(9):
        if dist.get_rank() == 1:
            time.sleep(0.5)
        train(engine, 1, first=step)
    stats = handle.stats()
    for what in ("gradients", "weights"):
        for way in ("quantized", "plain"):
            assert 0 < stats[f"{what}_{way}_s"] < 0.15, stats
    handle.detach()


def case_start_step_sends_in_full() -> None:
    plain, ours = make_engine(ENGINES["stage2"]), make_engine(ENGINES["stage2"])
    handle = attach(ours, four_bit(start_step=2))
    train(plain, 2)
    train(ours, 2)
    assert torch.equal(weights_of(plain), weights_of(ours))
    assert not handle.collectives.traffic.gradient_values
    train(ours, 1, first=2)
    assert bool(handle.collectives.traffic.gradient_values) == (dist.get_world_size() > 1)
    handle.detach()


def case_a_replica_that_drifts_stops_the_run() -> None:
    if dist.get_world_size() == 1:
        return
    engine = make_engine(ENGINES["stage2"])
    handle = attach(engine, four_bit(check_every=2))
    train(engine, 3)
    if dist.get_rank() == 1:
        next(engine.module.parameters()).data.view(-1)[5] += 0.5
    with pytest.raises(CommError, match=re.escape("different weights")):
        train(engine, 1, first=3)
    handle.detach()


def case_refusals() -> None:
    """What cannot be served is refused on every rank with the reason, and nothing is touched."""
    cases = [
        (ds_config(2, reduce_scatter=False), {}, "reduce_scatter=false"),
        (ds_config(1, use_multi_rank_bucket_allreduce=False), {}, "use_multi_rank_bucket_allreduce"),
        (ds_config(2, contiguous_gradients=False), {}, "contiguous_gradients=false"),
        (ds_config(3, zero_hpz_partition_size=dist.get_world_size()), {}, "hierarchical partitions"),
        (ds_config(3), {"sharded_weights": True}, "weights of ZeRO-3"),
        (ds_config(3), {"gradients": False}, "weights of ZeRO-3"),
        (ds_config(3), {"check_every": 5}, "check_every at ZeRO-3"),
        (ds_config(0, "fp32"), {}, "ZeRO stages 1 to 3"),
    ]
    for config, changes, words in cases:
        if "hierarchical" in words and dist.get_world_size() == 1:
            continue
        engine = make_engine(config)
        with pytest.raises(CommError, match=re.escape(words)):
            attach(engine, four_bit(**changes))
        assert_untouched(engine)

    engine = make_engine(ENGINES["stage1"])
    for attribute, value, words in (
        ("has_moe_layers", True, "mixture-of-experts"),
        ("sequence_parallel_size", 2, "sequence parallelism"),
    ):
        original = getattr(engine, attribute)
        setattr(engine, attribute, value)
        with pytest.raises(CommError, match=re.escape(words)):
            attach(engine, four_bit())
        setattr(engine, attribute, original)
        assert_untouched(engine)
    for key, value, words in (
        ("zero_quantized_gradients", True, "zero_quantized_gradients"),
        ("offload_optimizer", type("Offload", (), {"device": "cpu"})(), "offload_optimizer"),
    ):
        zero = engine._config.zero_config
        original = getattr(zero, key)
        object.__setattr__(zero, key, value)
        zero.__dict__[key] = value
        with pytest.raises(CommError, match=re.escape(words)):
            attach(engine, four_bit())
        zero.__dict__[key] = original
    assert_untouched(engine)

    handle = attach(engine, four_bit())
    with pytest.raises(CommError, match=re.escape("twice")):
        attach(engine, four_bit())
    handle.detach()


def case_gradients_that_go_elsewhere_stop_the_run() -> None:
    if dist.get_world_size() == 1:
        return
    engine = make_engine(ENGINES["stage2"])
    handle = attach(engine, four_bit())
    train(engine, 1)
    del engine.optimizer.allreduce_and_scatter
    with pytest.raises(NotLiveError, match=re.escape("reduced none")):
        train(engine, 1, first=1)
    engine.optimizer.allreduce_and_scatter = None
    handle.detach()


def case_ranks_that_disagree() -> None:
    if dist.get_world_size() == 1:
        return
    engine = make_engine(ENGINES["stage1"])
    with pytest.raises(CommError, match=re.escape("disagree")):
        attach(engine, four_bit(seed=dist.get_rank()))
    assert_untouched(engine)


def case_a_failed_attach_changes_nothing() -> None:
    """Replicas that differ, and a host on one rank that is not what it should be: an error on all ranks, engines as
    they were, and the next attach works."""
    if dist.get_world_size() == 1:
        return
    for name in ("stage2", "bf16_optimizer"):
        engine = make_engine(ENGINES[name])
        weight = next(engine.module.parameters()).data.view(-1)
        if dist.get_rank() == 0:
            weight[3] += 1.0
        with pytest.raises(CommError, match="different weights"):
            attach(engine, four_bit())
        assert_untouched(engine)
        if dist.get_rank() == 0:
            weight[3] -= 1.0
        before = weights_of(engine)
        dist.broadcast(before, 0)  # 1.0 in bfloat16 takes the last bits along
        weight.copy_(before[: weight.numel()])

        groups = "parallel_partitioned_bit16_groups" if name == "stage2" else "bf16_partitioned_groups"
        kept = vars(engine.optimizer)[groups]
        if dist.get_rank() == 1:
            delattr(engine.optimizer, groups)
        with pytest.raises(CommError, match=groups):
            attach(engine, four_bit())
        setattr(engine.optimizer, groups, kept)
        assert_untouched(engine)
        handle = attach(engine, four_bit())
        train(engine, 1)
        handle.detach()


def case_a_codec_that_is_not_built_on_one_rank_is_refused_on_all() -> None:
    if dist.get_world_size() == 1:
        return
    engine = make_engine(ENGINES["stage1"])
    package, name = "rl_accel.kernels.codec", "rl_accel.kernels.codec.cpp"
    backend = importlib.import_module(name)
    last = dist.get_world_size() - 1
    if dist.get_rank() == last:
        del vars(sys.modules[package])["cpp"]
        sys.modules[name] = None  # what an import of it finds where it was not built
    where = "" if dist.get_rank() == last else rf" \(found on rank {last}\)"
    with pytest.raises(NotLiveError, match=f"codec backend cpp does not load.*{where}$"):
        attach(engine, four_bit(backend="cpp"))
    sys.modules[name] = sys.modules[package].cpp = backend
    assert_untouched(engine)
    attach(engine, four_bit(backend="cpp")).detach()


def case_a_moved_seam_is_refused() -> None:
    """On one rank DeepSpeed looks different: all ranks refuse."""
    engine = make_engine(ENGINES["stage1"])
    kept = stage12_module.DeepSpeedZeroOptimizer.allreduce_and_scatter
    if dist.get_rank() == 0:
        stage12_module.DeepSpeedZeroOptimizer.allreduce_and_scatter = lambda self, bucket: None
    try:
        with pytest.raises(VersionError, match=re.escape("allreduce_and_scatter takes (self, bucket)")):
            attach(engine, four_bit())
    finally:
        stage12_module.DeepSpeedZeroOptimizer.allreduce_and_scatter = kept
    assert_untouched(engine)


def case_initialize_with_a_block() -> None:
    """In every form in which `deepspeed.initialize` takes a configuration; the caller's objects stay as they are."""
    config = {**ENGINES["stage2"], "sdp4bit": {"bypass": "never", "seed": 3}}
    path = Path(tempfile.mkdtemp()) / "ds.json"
    path.write_text(json.dumps(config))
    text = base64.urlsafe_b64encode(json.dumps(config).encode()).decode()
    options = argparse.Namespace(deepspeed_config=str(path), local_rank=int(os.environ["LOCAL_RANK"]))
    forms = {
        "config": lambda model, optimizer: initialize(model=model, optimizer=optimizer, config=config),
        "path": lambda model, optimizer: initialize(model=model, optimizer=optimizer, config=str(path)),
        "base64": lambda model, optimizer: initialize(model=model, optimizer=optimizer, config=text),
        "config_params": lambda model, optimizer: initialize(model=model, optimizer=optimizer, config_params=config),
        "args": lambda model, optimizer: initialize(args=options, model=model, optimizer=optimizer),
        "positions": lambda model, optimizer: initialize(options, model, optimizer),
    }
    for name, build in forms.items():
        torch.manual_seed(0)
        model = TinyGPT(width=32, layers=1, length=32)
        engine, *rest = build(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
        assert len(rest) == 3, name
        handle = engine.optimizer.sdp4bit_handle
        assert handle.config.seed == 3, name
        handle.detach()
    assert config["sdp4bit"] == {"bypass": "never", "seed": 3}
    assert options.deepspeed_config == str(path)
    train(engine, 1)

    path.write_text(json.dumps(ENGINES["stage2"]))
    assert_untouched(make_engine(str(path), build=initialize))
    assert_untouched(initialize(options, TinyGPT(width=32, layers=1, length=32), torch.optim.AdamW)[0])
    with pytest.raises(ConfigError, match=re.escape("Did you mean 'hadamard'")):
        make_engine({**ENGINES["stage2"], "sdp4bit": {"hadamrd": True}}, build=initialize)


def case_weights_set_by_hand_go_out_in_full() -> None:
    """`safe_set_full_fp32_param`, an edit of the master shard by one rank, and one of the held weights by all: after
    the next step the weights are DeepSpeed's own up to what 4 bits of that step lose, not 4 bits of the edit."""

    def set_by_name(engine) -> None:
        for parameter in engine.module.parameters():
            safe_set_full_fp32_param(parameter, 3.0 * safe_get_full_fp32_param(parameter))

    def edit_master(engine) -> None:
        optimizer = engine.optimizer
        masters = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
        if dist.get_rank() == dist.get_world_size() - 1:
            masters[0].data.mul_(-2.0)

    def edit_held(engine) -> None:
        with torch.no_grad():
            for parameter in engine.module.parameters():
                parameter.data.add_(1.0)

    for name, edit in (
        ("stage1", set_by_name),
        ("stage2_accumulates_fp32", edit_master),
        ("stage2", edit_held),
        ("bf16_optimizer", set_by_name),
    ):
        plain, ours = make_engine(ENGINES[name]), make_engine(ENGINES[name])
        handle = attach(ours, four_bit(gradients=False))
        for engine in (plain, ours):
            train(engine, 2)
            edit(engine)
        train(plain, 1, first=2)
        train(ours, 1, first=2)
        expected, found = weights_of(plain), weights_of(ours)
        off = float((found - expected).norm() / expected.norm())
        assert off < 5e-3, (name, off)
        assert same_on_all_ranks(found), name
        resyncs = handle.stats()["weight_resyncs"]
        assert resyncs == (dist.get_world_size() > 1), (name, resyncs)
        train(ours, 2, first=3)
        assert handle.stats()["weight_resyncs"] == resyncs, "once is enough"
        if dist.get_rank() == 0:
            handle.resync()
        train(ours, 2, first=5)
        assert handle.stats()["weight_resyncs"] == 2 * resyncs, "one rank asks for all"
        handle.detach()


def case_a_state_loaded_on_some_ranks_is_an_error_on_all() -> None:
    """Rank 0 alone loads a state whose choice is another one: without agreement the ranks enter different collectives
    and wait for ever. When all have loaded it, training goes on from it."""
    if dist.get_world_size() == 1:
        return
    for name in ("stage2", "bf16_optimizer", "stage3"):
        engine = make_engine(ENGINES[name])
        handle = attach(engine, four_bit(bypass="auto"))
        train(engine, 3)
        state = handle.state_dict()
        state["bypass"]["gradients"]["quantized"] = not state["bypass"]["gradients"]["quantized"]
        state["steps"] = 40
        if dist.get_rank() == 0:
            handle.load_state_dict(state)
        loss = loss_of(engine, TEXT.batch(2, dist.get_rank()))
        others = ", ".join(map(str, range(1, dist.get_world_size())))
        with pytest.raises(CommError, match=rf"there is none on ranks {others}\."):
            engine.backward(loss)
        handle.detach()

        engine = make_engine(ENGINES[name])
        handle = attach(engine, four_bit(bypass="auto"))
        train(engine, 1)
        handle.load_state_dict(state)
        assert handle.state_dict()["steps"] == 40
        train(engine, 1, first=1)
        assert handle.stats()["steps"] == 41
        with pytest.raises(CommError, match="not a state"):
            handle.load_state_dict({"steps": 3})
        train(engine, 1, first=2)
        assert handle.stats()["steps"] == 42
        handle.detach()


def case_bypass_decides_alike() -> None:
    if dist.get_world_size() == 1:
        return
    engine = make_engine(ENGINES["stage2"])
    handle = attach(engine, four_bit(bypass="auto"))
    train(engine, 12)
    stats = handle.stats()
    choices = [None] * dist.get_world_size()
    dist.all_gather_object(
        choices,
        [
            stats[f"{what}_{part}"]
            for what in ("gradients", "weights")
            for part in ("quantized", "quantized_s", "plain_s")
        ],
    )
    assert all(choice == choices[0] for choice in choices)
    assert stats["gradients_quantized"] == (stats["gradients_quantized_s"] <= stats["gradients_plain_s"])
    assert "times as fast" in stats["gradients_advice"]
    assert same_on_all_ranks(weights_of(engine))
    handle.detach()


def case_killed() -> None:
    """Not part of `all`: rank 1 is killed while training."""
    engine = make_engine(ENGINES["stage2"])
    attach(engine, four_bit())
    train(engine, 2)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    train(engine, 5, first=2)


def main() -> None:
    torch.set_num_threads(1)
    logger.setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    names = sys.argv[1:]
    for name in names:
        globals()[f"case_{name}"]()
    torch.save(names, os.environ["RESULT"])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
