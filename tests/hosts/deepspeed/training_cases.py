"""4-bit communication while it trains: equal replicas, the same loss, the right bytes, and restarts."""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from engines import ENGINES, TEXT, assert_untouched, four_bit, make_engine, same_on_all_ranks, train, weights_of

from rl_accel.comm import attach
from rl_accel.errors import CommError
from rl_accel.quickstart.tiny_gpt import loss_of


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


def case_overlap_is_the_same_run() -> None:
    """Weights that arrive while the next forward pass runs: each layer has its own when it begins, though the links of
    rank 1 are slow, and the run is the one without overlap, bit for bit."""
    if dist.get_world_size() == 1:
        return
    for name in ("stage1", "stage2_ga_overlap", "bf16_optimizer"):
        plain, ours = (make_engine(ENGINES[name], layers=4, width=128) for _ in range(2))
        handle = attach(plain, four_bit())
        train(plain, 6)
        handle.detach()
        handle = attach(ours, four_bit(overlap_weights=True))
        watched = _WatchedForwards(ours.module, handle)
        train(ours, 2)
        watched.late = 0
        with slow_links(0.02 if dist.get_rank() == 1 else 0.0):
            train(ours, 4, first=2)
        assert watched.wrong == 0, name
        late = torch.tensor(watched.late)
        dist.all_reduce(late)
        assert late >= 4, (name, "no forward pass began before all weights were there", int(late))
        watched.remove()
        handle.wait()
        assert torch.equal(weights_of(ours), weights_of(plain)), name
        assert same_on_all_ranks(weights_of(ours))
        saved = torch.cat([tensor.float().flatten() for tensor in ours.module.state_dict().values()])
        with slow_links(0.02):
            train(ours, 1, first=6)
            again = torch.cat([tensor.float().flatten() for tensor in ours.module.state_dict().values()])
        assert same_on_all_ranks(again) and not torch.equal(saved, again)
        handle.detach()


class _WatchedForwards:
    """Compares what layers had when they began with what they should have had."""

    def __init__(self, module, handle):
        self.module, self.handle = module, handle
        self.wrong = self.late = 0
        self._seen: dict[torch.nn.Module, torch.Tensor] = {}
        self._hooks = [part.register_forward_pre_hook(self._look) for part in (module, *module.blocks)]
        self._hooks.append(module.register_forward_hook(self._compare))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _look(self, part, _) -> None:
        if part is self.module:  # what no layer holds must be there, and layers need not be
            self._seen = {None: _joined(self._outside()), self.module: _joined(self.module.parameters())}
        else:
            self._seen[part] = _joined(part.parameters())

    def _compare(self, *_) -> None:
        self.handle.wait()
        right = {part: _joined(part.parameters()) for part in self.module.blocks} | {None: _joined(self._outside())}
        self.wrong += sum(not torch.equal(self._seen[part], right[part]) for part in right)
        self.late += not torch.equal(self._seen[self.module], _joined(self.module.parameters()))

    def _outside(self):
        inside = {id(p) for p in self.module.blocks.parameters()}
        return [p for p in self.module.parameters() if id(p) not in inside]


def _joined(parameters) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in parameters]).clone()


@contextmanager
def slow_links(seconds: float):
    """Make every exchange with another node take so long at least on this rank."""
    send = dist.batch_isend_irecv

    def slowly(operations):
        time.sleep(seconds)
        return send(operations)

    dist.batch_isend_irecv = slowly
    try:
        yield
    finally:
        dist.batch_isend_irecv = send


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
        others = ", ".join(map(str, range(1, dist.get_world_size())))
        with pytest.raises(CommError, match=rf"there is none on ranks {others}\."):
            engine.backward(loss_of(engine, TEXT.batch(2, dist.get_rank())))
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
