"""4-bit weights at ZeRO-3, by secondary shards: what crosses, what passes compute with, edits, restarts."""

from __future__ import annotations

import tempfile

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from engines import ENGINES, TEXT, ds_config, four_bit, make_engine, train, weights_of

from rl_accel.comm import attach
from rl_accel.errors import NotLiveError
from rl_accel.kernels.codec.layout import packed_bytes
from rl_accel.quickstart.tiny_gpt import loss_of


def sharded(**changes):
    """Two nodes of two ranks, or every rank a node."""
    return four_bit(**{"local_size": 2 if dist.get_world_size() == 4 else 1, "sharded_weights": True, **changes})


def held_weights(handle) -> torch.Tensor:
    return torch.cat([tensor.float().flatten() for _, tensor in handle.whole_weights()])


@torch.no_grad()
def loss_at(engine) -> float:
    return float(loss_of(engine, TEXT.batch(2, 0)))


def case_stage3_sends_differences() -> None:
    """Between nodes 4 bits of every weight once a step; passes compute with what all ranks hold alike; the loss follows
    the plain one. With persistent parameters only the others are sent so."""
    if dist.get_world_size() == 1:
        return
    for name in ("stage3", "stage3_fp32_ga", "persistent"):
        config = ENGINES.get(name, ds_config(3, stage3_param_persistence_threshold=2000))
        plain, ours = make_engine(config, layers=2), make_engine(config, layers=2)
        handle = attach(ours, sharded(check_every=1))
        plain_losses, losses = train(plain, 6), train(ours, 2)
        before = handle.stats()
        losses += train(ours, 4, first=2)
        stats = handle.stats()
        assert max(abs(a - b) for a, b in zip(plain_losses, losses, strict=True)) < 0.03, (name, plain_losses, losses)
        served = [p for p in ours.module.parameters() if not p.ds_persist]
        assert bool(len(served) < len([*ours.module.parameters()])) == (name == "persistent")
        block = sum(packed_bytes(parameter.ds_tensor.ds_numel, 4, 128) for parameter in served)
        sent = stats["weight_inter_bytes"] - before["weight_inter_bytes"]
        assert sent == 4 * (stats["num_nodes"] - 1) * block, (name, sent, block)
        assert bool(stats["weight_intra_bytes"]) == (stats["local_size"] > 1)
        assert stats["weight_resyncs"] == 0
        held, owned = held_weights(handle), weights_of(ours)
        assert held.shape == owned.shape
        apart = float((held - owned).norm() / owned.norm())
        assert 0 < apart < 0.01, (name, apart)
        with deepspeed.zero.GatheredParameters([*plain.module.parameters()], modifier_rank=0):
            for parameter, (_, tensor) in zip(plain.module.parameters(), handle.whole_weights(), strict=True):
                parameter.data.copy_(tensor)
        assert loss_at(ours) == loss_at(plain), name
        handle.detach()
        assert not any("_Fetches" in p.all_gather_coalesced.__qualname__ for p in ours.module.parameters())
        train(ours, 1, first=6)


def case_stage3_in_full_is_deepspeed() -> None:
    """Secondary shards that are filled in full precision: the weights are plain DeepSpeed's to the bit."""
    if dist.get_world_size() == 1:
        return
    plain, ours = make_engine(ENGINES["stage3"]), make_engine(ENGINES["stage3"])
    handle = attach(ours, sharded(start_step=100))
    assert train(plain, 4) == train(ours, 4)
    assert torch.equal(weights_of(plain), weights_of(ours))
    assert torch.equal(held_weights(handle), weights_of(ours))
    handle.detach()


def case_stage3_follows_whoever_writes() -> None:
    """Edits reach all ranks in full, before the next forward pass; and what the next step makes of them after it:
    DeepSpeed's step overwrites edited shards with what it has in float32."""
    if dist.get_world_size() == 1:
        return

    def edit_gathered(engine) -> None:
        with deepspeed.zero.GatheredParameters([*engine.module.parameters()], modifier_rank=0):
            for parameter in engine.module.parameters():
                parameter.data.mul_(-1.5)

    def edit_one_rank(engine) -> None:
        weights_of(engine)  # DeepSpeed keeps what a forward pass gathered for the backward pass, that never came
        if dist.get_rank() == dist.get_world_size() - 1:
            for parameter in engine.module.parameters():
                parameter.ds_tensor.data.add_(0.5)

    def set_master(engine) -> None:
        for parameter in engine.module.parameters():
            safe_set_full_fp32_param(parameter, 3.0 * safe_get_full_fp32_param(parameter))

    for edit in (edit_gathered, edit_one_rank, set_master):
        plain, ours = make_engine(ENGINES["stage3"]), make_engine(ENGINES["stage3"], seed=3)
        handle = attach(ours, sharded(gradients=False))
        train(ours, 2)
        before = loss_at(ours)
        edit(ours)
        found = loss_at(ours)
        owned = weights_of(ours)
        with deepspeed.zero.GatheredParameters([*plain.module.parameters()], modifier_rank=0):
            sizes = [parameter.ds_numel for parameter in plain.module.parameters()]
            for parameter, part in zip(plain.module.parameters(), owned.split(sizes), strict=True):
                parameter.data.copy_(part.view(parameter.ds_shape))
        assert found == loss_at(plain), edit
        assert (found == before) == (edit is set_master), edit
        train(ours, 1, first=2)
        held, owned = held_weights(handle), weights_of(ours)
        assert float((held - owned).norm() / owned.norm()) < 5e-3, edit
        times = 1 if edit is set_master else 2
        assert handle.stats()["weight_resyncs"] == times, edit
        train(ours, 2, first=3)
        assert handle.stats()["weight_resyncs"] == times, "that is enough"
        handle.check_replicas()
        handle.detach()


def case_stage3_resumes_bit_equal() -> None:
    """With what the other nodes held when it was saved: rounding that was owed is owed again."""
    if dist.get_world_size() == 1:
        return
    folder = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(folder)
    whole = make_engine(ENGINES["stage3"])
    handle = attach(whole, sharded())
    train(whole, 3)
    whole.save_checkpoint(folder[0], client_state={"sdp4bit": handle.state_dict()})
    losses = train(whole, 3, first=3)
    resumed = make_engine(ENGINES["stage3"], seed=1)
    _, client = resumed.load_checkpoint(folder[0])
    again = attach(resumed, sharded())
    again.load_state_dict(client["sdp4bit"])
    assert train(resumed, 3, first=3) == losses
    assert torch.equal(held_weights(again), held_weights(handle))
    assert torch.equal(weights_of(resumed), weights_of(whole))
    handle.detach()
    again.detach()


def case_stage3_fetches_elsewhere_stop_the_run() -> None:
    if dist.get_world_size() == 1:
        return
    engine = make_engine(ENGINES["stage3"])
    plain = [parameter.all_gather_coalesced for parameter in engine.module.parameters()]
    handle = attach(engine, sharded())
    train(engine, 1)
    for parameter, fetch in zip(engine.module.parameters(), plain, strict=True):
        parameter.all_gather_coalesced = fetch
    with pytest.raises(NotLiveError, match="gathered none through them"):
        train(engine, 1, first=1)
    handle.detach()
