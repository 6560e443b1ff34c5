"""One rank of test_collectives.py: runs every case on real gloo and checks it against a naive simulation."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import torch
import torch.distributed as dist

from rl_accel.comm import topology
from rl_accel.comm.collectives import QuantizedCollectives
from rl_accel.comm.config import SDP4BitConfig
from rl_accel.kernels.codec import api as codec
from rl_accel.kernels.codec.layout import packed_bytes, padded
from rl_accel.kernels.common.noise import fold_key

SIZES = {
    "even": [1024] * 4,
    "uneven": [1000, 31, 4097, 128],
    "some_empty": [0, 700, 0, 33],
    "incast": [5000, 0, 0, 0],
    "all_empty": [0, 0, 0, 0],
}


def contribution(rank: int, destination: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + destination)
    x = torch.randn(numel, generator=generator)
    x[torch.rand(numel, generator=generator) < 0.01] *= 30
    return x.to(dtype)


def simulated(shape, config: SDP4BitConfig, sizes, destination: int, dtype, calls: int) -> torch.Tensor:
    """What rank `destination` should get, from every rank's contribution, one block at a time."""
    nodes, local_size = shape.nodes, shape.local_size
    group = config.gradient_group_size
    node = next(i for i, ranks in enumerate(nodes) if destination in ranks)
    place = nodes[node].index(destination)
    numel = sizes[destination]

    def key(hop: int, rank: int) -> int:
        return fold_key(config.seed, calls, hop, rank)

    def first_offset() -> int:
        order = [ranks[peer] for peer in range(local_size) for ranks in nodes]
        return sum(padded(sizes[rank], group) for rank in order[: order.index(destination)])

    def one_hop_offset(order) -> int:
        return sum(padded(sizes[rank], group) for rank in order[: list(order).index(destination)])

    def encoded(rank: int, bits: int, hop: int, offset: int) -> torch.Tensor:
        x = contribution(rank, destination, numel, dtype)
        x = x.float() if dtype == torch.float16 else x
        return codec.quantize(
            x, bits, group, config.gradient_rounding, key(hop, rank), offset, hadamard=config.hadamard, backend="torch"
        )

    def decoded(blocks, bits: int) -> torch.Tensor:
        return codec.dequantize(torch.stack(blocks), numel, bits, group, hadamard=config.hadamard, backend="torch")

    if len(nodes) == 1:
        offset = one_hop_offset(nodes[0])
        return decoded([encoded(rank, config.intra_bits, 1, offset) for rank in nodes[0]], config.intra_bits)
    if local_size == 1:
        order = [ranks[0] for ranks in nodes]
        offset = one_hop_offset(order)
        return decoded([encoded(rank, config.inter_bits, 2, offset) for rank in order], config.inter_bits)
    middle = []
    for ranks in nodes:
        blocks = torch.stack([encoded(rank, config.intra_bits, 1, first_offset()) for rank in ranks])
        column = [other[place] for other in nodes]
        middle.append(
            codec.requantize(
                blocks,
                numel,
                config.intra_bits,
                group,
                config.inter_bits,
                group,
                config.gradient_rounding,
                key(2, ranks[place]),
                one_hop_offset(column),
                backend="torch",
            )
        )
    return decoded(middle, config.inter_bits)


def check_reduce_scatter(group, results) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for local_size in [n for n in (1, 2, 4) if world_size % n == 0]:
        shape = topology.build(group, local_size)
        for name, all_sizes in SIZES.items():
            sizes = all_sizes[:world_size]
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                for config in (
                    SDP4BitConfig(gradient_rounding="stochastic"),
                    SDP4BitConfig(gradient_rounding="nearest", hadamard=False, gradient_group_size=32),
                    SDP4BitConfig(intra_bits=16, inter_bits=16),
                    SDP4BitConfig(intra_bits=8, inter_bits=16),
                ):
                    collectives = QuantizedCollectives(shape, config)
                    blocks = [contribution(rank, d, numel, dtype) for d, numel in enumerate(sizes)]
                    out = torch.full((sizes[rank],), float("nan"), dtype=torch.float32)
                    assert collectives.reduce_scatter(blocks, out) is out
                    exact = sum(contribution(r, rank, sizes[rank], dtype).double() for r in range(world_size))
                    case = (name, local_size, dtype, config)
                    if world_size > 1 and config.intra_bits < 16 and config.inter_bits < 16:
                        assert torch.equal(out, simulated(shape, config, sizes, rank, dtype, 1)), case
                    error = (out.double() - exact).norm() / exact.norm().clamp_min(1e-9)
                    assert error < (0.3 if config.inter_bits < 16 else 0.02 if config.intra_bits < 16 else 0.005), (
                        case,
                        error,
                    )
        results.setdefault("shapes", []).append((shape.num_nodes, shape.local_size))


def check_traffic(group, results) -> None:
    """Bytes counted are those of the formulas in the head of collectives.py."""
    world_size = dist.get_world_size()
    for local_size in [n for n in (1, 2, 4) if world_size % n == 0]:
        shape = topology.build(group, local_size)
        nodes = shape.num_nodes
        numel = 4096
        total = numel * world_size
        collectives = QuantizedCollectives(shape, SDP4BitConfig())
        collectives.reduce_scatter([torch.ones(numel)] * world_size, torch.empty(numel))
        held = torch.zeros(total)
        collectives.gather_difference(held, torch.ones(numel), torch.zeros(numel))
        traffic = collectives.traffic
        eight, four = packed_bytes(total, 8, 128), packed_bytes(total, 4, 128)
        assert traffic.gradient_intra == eight * (local_size - 1) // local_size
        assert traffic.gradient_inter == four // local_size * (nodes - 1) // nodes
        assert traffic.weight_inter == four // world_size * (nodes - 1)
        assert traffic.weight_intra == four * (local_size - 1) // local_size


def check_stochastic_rounding_is_unbiased(group) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    config = SDP4BitConfig(gradient_rounding="stochastic")
    collectives = QuantizedCollectives(topology.build(group, 2 if world_size % 2 == 0 else None), config)
    blocks = [contribution(rank, d, 256, torch.float32) for d in range(world_size)]
    exact = sum(contribution(r, rank, 256, torch.float32).double() for r in range(world_size))
    draws = torch.stack([collectives.reduce_scatter(blocks, torch.empty(256)).double() for _ in range(300)])
    # 256 means of 300 draws: one beyond 5.5 standard errors comes once in 100,000 runs.
    assert ((draws.mean(0) - exact).abs() <= 5.5 * draws.std(0) / 300**0.5 + 1e-6).all()


def check_bad_values_reach_the_owner(group) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for local_size in [n for n in (1, 2, 4) if world_size % n == 0]:
        collectives = QuantizedCollectives(topology.build(group, local_size), SDP4BitConfig())
        for bad in (float("nan"), float("inf"), float("-inf")):
            blocks = [contribution(rank, d, 512, torch.bfloat16) for d in range(world_size)]
            if rank == 0:
                blocks[world_size - 1][300] = bad
            out = collectives.reduce_scatter(blocks, torch.empty(512))
            poisoned = ~torch.isfinite(out)
            assert poisoned[300] == (rank == world_size - 1)
            assert not poisoned[:256].any()
            assert not poisoned[384:].any()


def check_gather(group) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for local_size in [n for n in (1, 2, 4) if world_size % n == 0]:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for numel in (0, 1, 33, 1000):
                collectives = QuantizedCollectives(topology.build(group, local_size), SDP4BitConfig())
                held = torch.cat([contribution(7, r, numel, dtype) for r in range(world_size)])
                shards = held.view(world_size, -1)
                target = shards.float().clone()
                first_gap = None
                for _ in range(6):
                    new = (target[rank] + 0.01 * torch.arange(numel) / max(numel, 1)).to(dtype)
                    old = shards[rank].clone()
                    shards[rank].copy_(new)  # as the host does before it gathers
                    collectives.gather_difference(held, new, old)
                    gap = (shards[rank].float() - new.float()).abs().max() if numel else torch.tensor(0.0)
                    first_gap = gap if first_gap is None else first_gap
                everyone = [torch.empty_like(held) for _ in range(world_size)]
                dist.all_gather(everyone, held, group=group)
                assert all(torch.equal(everyone[0], other) for other in everyone), (local_size, dtype, numel)
                # What one step lost, the next ones send: the same target again and again is met to a rounding error.
                assert gap <= max(first_gap, torch.tensor(0.02)), (gap, first_gap)
                if dtype == torch.float32 and numel:
                    assert gap < 1e-4


def check_one_rank_asks_for_all_in_full(group) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for local_size in [n for n in (1, 2, 4) if world_size % n == 0]:
        for numel in (33, 1000):
            collectives = QuantizedCollectives(topology.build(group, local_size), SDP4BitConfig())
            start = torch.cat([contribution(7, r, numel, torch.float32) for r in range(world_size)])
            goal = torch.cat([contribution(8, r, numel, torch.float32) for r in range(world_size)])
            own = slice(rank * numel, (rank + 1) * numel)
            for asking in (None, *range(world_size)):
                held = start.clone()
                in_full = collectives.gather_difference(held, goal[own], start[own].clone(), rank == asking)
                assert in_full == (asking is not None or world_size == 1), asking
                assert torch.equal(held, goal) == in_full
                assert (held - goal).norm() < (start - goal).norm()


def check_gather_sum(group) -> None:
    for config, error in (
        (SDP4BitConfig(), 0.02),
        (SDP4BitConfig(intra_bits=16, inter_bits=16), 0.003),  # half a unit of bfloat16 is 0.002 at most
        (SDP4BitConfig(intra_bits=4, inter_bits=4), 0.02),
    ):
        check_gather_sum_of(group, config, error)


def check_gather_sum_of(group, config: SDP4BitConfig, error: float) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    sizes = [1000, 0, 31, 129][:world_size]
    for local_size in [n for n in (1, 2, 4) if world_size % n == 0]:
        collectives = QuantizedCollectives(topology.build(group, local_size), config)
        parts = collectives.gather_sum(contribution(rank, 0, sizes[rank], torch.float32), sizes)
        flat = torch.cat(parts)
        everyone = [torch.empty_like(flat) for _ in range(world_size)]
        dist.all_gather(everyone, flat, group=group)
        assert all(torch.equal(everyone[0], other) for other in everyone)
        for r, part in enumerate(parts):
            exact = contribution(r, 0, sizes[r], torch.float32)
            assert (part - exact).norm() <= error * exact.norm()


def check_backends_agree(group) -> None:
    """The C++ backend ends with the same bits as the specification, through all hops."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shape = topology.build(group, 2 if world_size % 2 == 0 else None)
    outs = []
    for backend in ("torch", "cpp"):
        collectives = QuantizedCollectives(shape, replace(SDP4BitConfig(), backend=backend))
        blocks = [contribution(rank, d, 5000 + d, torch.bfloat16) for d in range(world_size)]
        out = collectives.reduce_scatter(blocks, torch.empty(5000 + rank))
        held = torch.cat([contribution(9, d, 3000, torch.bfloat16) for d in range(world_size)])
        new = held.view(world_size, -1)[rank] * 1.01
        collectives.gather_difference(held, new, held.view(world_size, -1)[rank].clone())
        outs.append((out, held))
    assert torch.equal(outs[0][0], outs[1][0])
    assert torch.equal(outs[0][1], outs[1][1])


def die_in_the_middle(group) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    collectives = QuantizedCollectives(topology.build(group, 2), SDP4BitConfig())
    for call in range(5):
        if rank == 1 and call == 2:
            os._exit(7)
        collectives.reduce_scatter([torch.ones(1 << 16)] * world_size, torch.empty(1 << 16))


def main() -> None:
    dist.init_process_group("gloo")
    group, results = dist.group.WORLD, {}
    if sys.argv[1:] == ["die"]:
        return die_in_the_middle(group)
    check_reduce_scatter(group, results)
    check_traffic(group, results)
    check_stochastic_rounding_is_unbiased(group)
    check_bad_values_reach_the_owner(group)
    check_gather(group)
    check_one_rank_asks_for_all_in_full(group)
    check_gather_sum(group)
    check_backends_agree(group)
    torch.save(results, os.environ["RESULT"])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
