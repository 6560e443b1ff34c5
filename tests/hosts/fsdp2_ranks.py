"""One rank of test_fsdp2.py: FSDP2 with and without 4-bit communication, on real gloo."""

from __future__ import annotations

import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

from rl_accel.comm import SDP4BitConfig, attach
from rl_accel.comm.hosts.fsdp2 import DifferenceAllGather, QuantizedReduceScatter
from rl_accel.errors import CommError
from rl_accel.quickstart.tiny_gpt import MarkovText, TinyGPT, loss_of

TEXT = MarkovText(length=32)


def four_bit(**changes) -> SDP4BitConfig:
    local_size = 2 if dist.get_world_size() == 4 else 1
    return SDP4BitConfig(**{"local_size": local_size, "bypass": "never", **changes})


def make(mesh=None, reshard_after_forward=None, **policy):
    torch.manual_seed(0)
    model = TinyGPT(width=32, layers=2, length=32)
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    options = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(**policy)}
    options["reshard_after_forward"] = reshard_after_forward
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model, torch.optim.AdamW(model.parameters(), lr=3e-3)


def train(model, optimizer, steps: int, first: int = 0, norms: list[float] | None = None) -> list[float]:
    """Returns the mean loss of every step; appends the norms of the gradients before clipping to `norms`."""
    rank, world_size, losses = dist.get_rank(), dist.get_world_size(), []
    for step in range(first, first + steps):
        loss = loss_of(model, TEXT.batch(2, step * world_size + rank))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if norms is not None:
            norms.append(float(norm.full_tensor()))
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / world_size)
    return losses


def full(model) -> torch.Tensor:
    return torch.cat([p.full_tensor().detach().float().flatten() for p in model.parameters()])


POLICIES = {
    "fp32": {},
    "bf16": {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32},
    "bf16_reduce": {"param_dtype": torch.bfloat16, "reduce_dtype": torch.bfloat16},
}


def check_training() -> None:
    for name, policy in POLICIES.items():
        plain, plain_optimizer = make(**policy)
        start = full(plain)
        plain_norms, norms = [], []
        plain_losses = train(plain, plain_optimizer, 3, norms=plain_norms)
        for changes in ({"sharded_weights": False}, {"sharded_weights": True}):
            ours, optimizer = make(**policy)
            exact = four_bit(intra_bits=16, inter_bits=16, weight_bits=16, **changes)
            handle = attach(ours, exact, optimizer)
            norms.clear()
            losses = train(ours, optimizer, 3, norms=norms)
            assert abs(norms[0] / plain_norms[0] - 1) < 0.01, (name, changes, norms, plain_norms)
            moved, apart = full(plain) - start, full(ours) - full(plain)
            assert apart.norm() < 0.25 * moved.norm(), (name, changes, float(apart.norm() / moved.norm()))
            assert abs(losses[-1] - plain_losses[-1]) < 2e-3
            handle.detach()

            ours, optimizer = make(**policy)
            handle = attach(ours, four_bit(**changes), optimizer)
            norms.clear()
            losses = train(ours, optimizer, 3, norms=norms)
            assert abs(norms[0] / plain_norms[0] - 1) < 0.05, (name, changes, norms, plain_norms)
            assert max(abs(a - b) for a, b in zip(losses, plain_losses, strict=True)) < 0.03
            stats = handle.stats()
            if dist.get_world_size() > 1:
                assert stats["gradient_values"] >= 3 * start.numel()
                assert bool(stats["weight_values"]) == changes["sharded_weights"]
            if changes["sharded_weights"] and dist.get_world_size() > 1:
                handle.check_replicas()
                # After the first step, differences go out once a step; backward is served from the copy.
                assert stats["weight_values"] <= 2 * 1.1 * start.numel()
            handle.detach()


def check_a_smaller_mesh_after_forward() -> None:
    """`reshard_after_forward=2` of 4 ranks: the gather of backward is over 2 ranks. With weights sent as they are,
    losses, norms and weights are those of plain FSDP2 to the bit."""
    if dist.get_world_size() != 4:
        return
    runs = []
    for config in (None, four_bit(sharded_weights=True, weight_bits=16, gradients=False)):
        model, optimizer = make(reshard_after_forward=2, **POLICIES["bf16"])
        handle = config and attach(model, config, optimizer)
        norms: list[float] = []
        losses = train(model, optimizer, 3, norms=norms)
        runs.append((losses, norms, full(model)))
    handle.check_replicas()
    assert runs[0][:2] == runs[1][:2], runs
    assert torch.equal(runs[0][2], runs[1][2])
    assert handle.stats()["weight_values"] >= 2 * runs[0][2].numel() / 2  # of a place, in two steps
    handle.detach()

    model, optimizer = make(reshard_after_forward=2, **POLICIES["bf16"])
    handle = attach(model, four_bit(sharded_weights=True), optimizer)
    norms = []
    train(model, optimizer, 3, norms=norms)
    assert max(abs(a / b - 1) for a, b in zip(norms, runs[0][1], strict=True)) < 0.1, (norms, runs[0][1])
    handle.detach()


def check_loading_sends_in_full() -> None:
    """Loaded weights may be anywhere; a 4-bit difference to what was held would be far off."""
    if dist.get_world_size() == 1:
        return
    model, optimizer = make()
    handle = attach(model, four_bit(sharded_weights=True), optimizer)
    train(model, optimizer, 2)
    state = {name: value.detach() * 3.0 for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    sent = handle.collectives.traffic.weight_values
    ids = TEXT.batch(2, 0)
    with torch.no_grad():
        loss = loss_of(model, ids)
    plain, _ = make()
    plain.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(loss, loss_of(plain, ids))
    assert handle.collectives.traffic.weight_values == sent
    handle.detach()


def shards(model) -> list[torch.Tensor]:
    """The local tensors of the sharded parameters, whatever a forward left."""
    for part in (model, *model.blocks):
        part.reshard()
    return [parameter.to_local() for parameter in model.parameters()]


def swap_by_data(model, optimizer) -> None:
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data * 0.5)


def load_with_dcp(model, optimizer) -> None:
    folder = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(folder)
    saved = {name: weight.detach() + 0.25 for name, weight in model.state_dict().items()}
    dcp.save(saved, checkpoint_id=folder[0])
    dcp.load(model.state_dict(), checkpoint_id=folder[0])


def step_of_another_optimizer(model, optimizer) -> None:
    other = torch.optim.SGD(list(model.parameters())[::2], lr=3.0, foreach=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    other.step()
    optimizer.zero_grad()


def edit_one_rank(model, optimizer) -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        for shard in shards(model):
            shard.mul_(-1.5)


EDITS = {
    "in place": lambda model, optimizer: [parameter.add_(0.5) for parameter in model.parameters()],
    "foreach": lambda model, optimizer: torch._foreach_mul_(list(model.parameters()), -1.0),
    "data": swap_by_data,
    "dcp.load": load_with_dcp,
    "another optimizer": step_of_another_optimizer,
    "one rank": edit_one_rank,
}


@torch.no_grad()
def check_the_copy_follows_whoever_writes() -> None:
    """Between steps, with forwards before and after: the loss is that of plain FSDP2 with the same shards, to the bit.
    Served from the copy it would be the loss of before. An edit between backward and step reaches all in full too."""
    if dist.get_world_size() == 1:
        return
    ids = TEXT.batch(2, 0)
    for name, edit in EDITS.items():
        model, optimizer = make()
        plain, _ = make()
        handle = attach(model, four_bit(sharded_weights=True, gradients=False), optimizer)
        with torch.enable_grad():
            train(model, optimizer, 2)
        before = float(loss_of(model, ids))
        for times in (1, 2):
            shards(model)
            edit(model, optimizer)
            found = float(loss_of(model, ids))
            for mine, theirs in zip(shards(model), shards(plain), strict=True):
                theirs.copy_(mine)
            assert found == float(loss_of(plain, ids)), (name, times)
            assert found != before, name
            assert handle.stats()["weight_resyncs"] == times, name
        assert found == float(loss_of(model, ids))
        assert handle.stats()["weight_resyncs"] == 2, (name, "nothing changed")
        handle.check_replicas()

        with torch.enable_grad():
            loss_of(model, ids).backward()
        edit(model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        found = float(loss_of(model, ids))
        for mine, theirs in zip(shards(model), shards(plain), strict=True):
            theirs.copy_(mine)
        assert found == float(loss_of(plain, ids)), name
        assert handle.stats()["weight_resyncs"] == 3, name
        with torch.enable_grad():
            train(model, optimizer, 2)
        assert handle.stats()["weight_resyncs"] == 3, "optimizer steps are no edits"
        handle.detach()


def check_a_state_loaded_on_some_ranks_is_an_error_on_all() -> None:
    if dist.get_world_size() == 1:
        return
    for changes in ({}, {"sharded_weights": True}):
        model, optimizer = make()
        handle = attach(model, four_bit(bypass="auto", **changes), optimizer)
        train(model, optimizer, 3)
        state = handle.state_dict()
        state["bypass"]["gradients"]["quantized"] = not state["bypass"]["gradients"]["quantized"]
        if dist.get_rank() == 1:
            handle.load_state_dict(state)
        try:
            train(model, optimizer, 1, first=3)
        except CommError as error:
            assert "load_state_dict must be called" in str(error)
        else:
            raise AssertionError("a state on one rank was accepted")
        handle.detach()


def comms(model):
    states = [part._get_fsdp_state() for part in (model, *model.blocks)]
    # One group a module before torch 2.13.
    groups = [s._fsdp_param_groups[0] if hasattr(s, "_fsdp_param_groups") else s._fsdp_param_group for s in states]
    return [(type(g._all_gather_comm), type(g._reduce_scatter_comm)) for g in groups]


def check_detach_and_refusals() -> None:
    world_size = dist.get_world_size()
    model, optimizer = make()
    handle = attach(model, four_bit(sharded_weights=True), optimizer)
    # One rank has no other node to send weights to.
    gather = DefaultAllGather if world_size == 1 else DifferenceAllGather
    assert comms(model) == [(gather, QuantizedReduceScatter)] * 3
    train(model, optimizer, 1)
    handle.detach()
    assert comms(model) == [(DefaultAllGather, DefaultReduceScatter)] * 3
    before = handle.stats()
    train(model, optimizer, 1, first=1)
    assert handle.stats() == before

    def refused(words, model, config, optimizer):
        try:
            attach(model, config, optimizer)
        except CommError as error:
            assert words in str(error), str(error)
        else:
            raise AssertionError(f"not refused: {words}")
        assert comms(model) == [(DefaultAllGather, DefaultReduceScatter)] * 3

    refused("optimizer=", model, four_bit(), None)
    refused("sharded_weights", model, four_bit(gradients=False, sharded_weights=False), optimizer)
    refused("check_every", model, four_bit(check_every=1, sharded_weights=False), optimizer)
    if world_size > 1:
        refused("disagree", model, four_bit(seed=dist.get_rank()), optimizer)
    if world_size == 4:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        refused("one dimension", make(mesh=grid)[0], four_bit(), optimizer)
    try:
        attach(torch.nn.Linear(2, 2), four_bit())
    except CommError as error:
        assert "got Linear" in str(error)
    else:
        raise AssertionError("attached to a plain module")


CHECKS = [name for name in globals() if name.startswith("check_")]


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in sys.argv[1:] or CHECKS:
        globals()[name]()
    torch.save("done", os.environ["RESULT"])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
