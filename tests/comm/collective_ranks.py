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
from rl_accel.comm.difference import DifferenceRing
from rl_accel.comm.difference_gather import DifferenceGather
from rl_accel.comm.plan import make_plan
from rl_accel.comm.secondary import SecondaryShards, Unit
from rl_accel.comm.traffic import Traffic
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
    """What rank `destination` should get, from every rank's contribution, one piece at a time."""
    nodes = shape.nodes
    group = config.gradient_group_size
    plan = make_plan(list(enumerate(sizes)), shape, group)
    out = torch.full((sizes[destination],), float("nan"))
    first_of_block = sum(sizes[:destination])
    node = next(i for i, ranks in enumerate(nodes) if destination in ranks)

    def key(hop: int, rank: int) -> int:
        return fold_key(config.seed, calls, hop, rank)

    def encoded(rank: int, piece, bits: int, hop: int, offset: int) -> torch.Tensor:
        x = torch.cat([contribution(rank, d, numel, dtype) for d, numel in enumerate(sizes)])
        x = x[piece.start : piece.start + piece.count]
        x = x.float() if dtype == torch.float16 else x
        return codec.quantize(
            x, bits, group, config.gradient_rounding, key(hop, rank), offset, hadamard=config.hadamard, backend="torch"
        )

    for place in range(shape.local_size):
        target = place * plan.rows.numel
        for other, column in enumerate(plan.columns[place]):
            for piece in column.pieces:
                here, target = target, target + padded(piece.count, group)
                if other != node or piece.owner != destination:
                    continue
                blocks = []
                for ranks in nodes:
                    if shape.local_size == 1:
                        blocks.append(encoded(ranks[0], piece, config.inter_bits, 2, here))
                        continue
                    parts = torch.stack([encoded(rank, piece, config.intra_bits, 1, here) for rank in ranks])
                    if len(nodes) == 1:
                        blocks = list(parts)
                        continue
                    args = (piece.count, config.intra_bits, group, config.inter_bits, group, config.gradient_rounding)
                    offset = here - place * plan.rows.numel
                    blocks.append(codec.requantize(parts, *args, key(2, ranks[place]), offset, backend="torch"))
                bits = config.intra_bits if len(nodes) == 1 else config.inter_bits
                total = codec.dequantize(
                    torch.stack(blocks), piece.count, bits, group, hadamard=config.hadamard, backend="torch"
                )
                out[piece.start - first_of_block :][: piece.count] = total
    return out


def blocks_in_one(rank: int, sizes, dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([contribution(rank, d, numel, dtype) for d, numel in enumerate(sizes)])


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
                    out = torch.full((sizes[rank],), float("nan"), dtype=torch.float32)
                    assert collectives.reduce_scatter(blocks_in_one(rank, sizes, dtype), sizes, out) is out
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


def check_queue(group) -> None:
    """Buckets of contiguous partitions, as DeepSpeed fills them: sums are those of one bucket after the other, every
    link carries the same, in the exchange and in each of its chunks, and chunks change nothing."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    partition = 40_000
    owners = [(r, partition) for r in reversed(range(world_size))]
    buckets = [owners[:1], [(world_size - 1, 3000), (0, 5000)], [(0, 100)], owners[1:]]
    for local_size in [n for n in (1, 2, 4) if world_size % n == 0]:
        shape = topology.build(group, local_size)
        found = []
        for max_buffer_mib, together in ((512, True), (512, False), (1, True)):
            config = SDP4BitConfig(gradient_rounding="stochastic", max_buffer_mib=max_buffer_mib)
            collectives = QuantizedCollectives(shape, config)
            sums: dict[tuple[int, int], torch.Tensor] = {}
            for number, slices in enumerate(buckets):
                numel = sum(count for _, count in slices)

                def deliver(start, part, number=number, sums=sums):
                    sums[number, start] = part.clone()

                values = contribution(rank, 10 + number, numel, torch.float32)
                collectives.reduction.add(values, slices, deliver)
                values.fill_(float("nan"))  # the bucket's memory is used again
                if not together:
                    collectives.reduction.flush()
            assert collectives.reduction.pending == (len(buckets) if together else 0)
            collectives.reduction.flush()
            check_sums(buckets, sums, rank, world_size)
            found.append((sums, collectives.traffic))
        for other, traffic in found[1:]:
            assert other.keys() == found[0][0].keys()
            assert all(torch.equal(found[0][0][key], other[key]) for key in other)
            assert traffic == found[0][1]
        check_links(group, shape, found[0][1], buckets)


def check_sums(buckets, sums, rank: int, world_size: int) -> None:
    """This rank got exactly what it owns, once, near the true sum."""
    for number, slices in enumerate(buckets):
        numel = sum(count for _, count in slices)
        exact = sum(contribution(r, 10 + number, numel, torch.float32).double() for r in range(world_size))
        owned, start = torch.zeros(numel, dtype=torch.bool), 0
        for owner, count in slices:
            owned[start : start + count] = owner == rank
            start += count
        got = torch.full((numel,), float("nan"), dtype=torch.float64)
        for (bucket, first), part in sums.items():
            if bucket == number:
                assert got[first : first + part.numel()].isnan().all(), "a value came twice"
                got[first : first + part.numel()] = part.double()
        assert torch.equal(~got.isnan(), owned)
        if owned.any():
            assert (got - exact)[owned].norm() < 0.3 * exact[owned].norm()


def check_links(group, shape, traffic, buckets) -> None:
    """Each rank sends to other nodes as much as any other, in spite of the buckets' owners."""
    sent = torch.tensor([traffic.gradient_intra, traffic.gradient_inter], dtype=torch.float64)
    everyone = [torch.empty_like(sent) for _ in range(shape.world_size)]
    dist.all_gather(everyone, sent, group=group)
    intra, inter = torch.stack(everyone).T
    assert bool(intra.any()) == (shape.local_size > 1) and bool(inter.any()) == (shape.num_nodes > 1)
    assert inter.max() <= 1.06 * inter.mean(), (shape, inter)  # groups are whole
    total = sum(count for slices in buckets for _, count in slices)
    needed = packed_bytes(total, 4, 128) * (shape.num_nodes - 1) / shape.world_size
    assert traffic.gradient_inter <= 1.05 * needed + 4 * 68 * shape.num_nodes


def check_traffic(group, results) -> None:
    """Bytes counted are those of the formulas in the head of collectives.py."""
    world_size = dist.get_world_size()
    for local_size in [n for n in (1, 2, 4) if world_size % n == 0]:
        shape = topology.build(group, local_size)
        nodes = shape.num_nodes
        numel = 4096
        total = numel * world_size
        collectives = QuantizedCollectives(shape, SDP4BitConfig())
        collectives.reduce_scatter(torch.ones(total), [numel] * world_size, torch.empty(numel))
        traffic = collectives.traffic
        eight, four = packed_bytes(total, 8, 128), packed_bytes(total, 4, 128)
        assert traffic.gradient_intra == eight * (local_size - 1) // local_size
        assert traffic.gradient_inter == four // local_size * (nodes - 1) // nodes


def check_stochastic_rounding_is_unbiased(group) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    config = SDP4BitConfig(gradient_rounding="stochastic")
    collectives = QuantizedCollectives(topology.build(group, 2 if world_size % 2 == 0 else None), config)
    sizes = [256] * world_size
    values = blocks_in_one(rank, sizes, torch.float32)
    exact = sum(contribution(r, rank, 256, torch.float32).double() for r in range(world_size))
    draws = torch.stack([collectives.reduce_scatter(values, sizes, torch.empty(256)).double() for _ in range(300)])
    # 256 means of 300 draws: one beyond 5.5 standard errors comes once in 100,000 runs.
    assert ((draws.mean(0) - exact).abs() <= 5.5 * draws.std(0) / 300**0.5 + 1e-6).all()


def check_bad_values_reach_the_owner(group) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for local_size in [n for n in (1, 2, 4) if world_size % n == 0]:
        collectives = QuantizedCollectives(topology.build(group, local_size), SDP4BitConfig())
        for bad in (float("nan"), float("inf"), float("-inf")):
            values = blocks_in_one(rank, [512] * world_size, torch.bfloat16)
            if rank == 0:
                values[512 * (world_size - 1) + 300] = bad
            out = collectives.reduce_scatter(values, [512] * world_size, torch.empty(512))
            poisoned = ~torch.isfinite(out)
            assert poisoned[300] == (rank == world_size - 1)
            assert not poisoned[:256].any()
            assert not poisoned[384:].any()


def check_secondary_shards(group) -> None:
    """Equal on all ranks of a place, and what is gathered from them on all ranks, for one unit or several at once; what
    one step lost the next ones send; bytes are those of the formula."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for local_size in [n for n in (1, 2) if world_size % n == 0 and world_size > n]:
        shape = topology.build(group, local_size)
        nodes = shape.num_nodes
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for numels in ([0], [1], [33], [1000], [130, 0, 1, 500]):
                case = local_size, dtype, numels
                traffic = Traffic()
                exchange, units = SecondaryShards(shape, SDP4BitConfig(), traffic), [Unit() for _ in numels]
                starts = [torch.stack([contribution(7, r, n, dtype) for r in range(world_size)]) for n in numels]
                wholes = [torch.empty_like(start) for start in starts]
                exchange.fill(units, [start[rank] for start in starts])
                exchange.gather(units, wholes)
                assert all(map(torch.equal, wholes, starts)), case
                goals = [
                    start[rank].float() + 0.01 * torch.arange(n) / max(n, 1)
                    for start, n in zip(starts, numels, strict=True)
                ]
                goals, gaps = [goal.to(dtype) for goal in goals], []
                for _ in range(6):
                    exchange.renew(units, goals)
                    exchange.gather(units, wholes)
                    apart = [whole[rank].float() - goal.float() for whole, goal in zip(wholes, goals, strict=True)]
                    gaps.append(max(float(gap.abs().max()) if gap.numel() else 0.0 for gap in apart))
                whole = torch.cat([whole.flatten() for whole in wholes])
                everyone = [torch.empty_like(whole) for _ in range(world_size)]
                dist.all_gather(everyone, whole, group=group)
                assert all(torch.equal(everyone[0], other) for other in everyone), case
                assert gaps[-1] <= max(gaps[0], 0.02), (case, gaps)
                if dtype == torch.float32:
                    assert gaps[-1] < 1e-4
                block = sum(packed_bytes(numel, 4, 128) for numel in numels if numel)
                assert traffic.weight_inter == 6 * (nodes - 1) * block
                assert traffic.weight_intra == 7 * (local_size - 1) * nodes * sum(numels) * starts[0].element_size()
                assert sum(unit.held.numel() for unit in units) == whole.numel() // local_size


def check_ring(group) -> None:
    """Replicas of contiguous shards: equal on all ranks to what one rank computes alone, in chunks of any size, in the
    order of any priority, by the ring and by gathers, with the bytes of the formulas."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    numels = [70_000, 0, 33, 300_001]
    reverse = lambda flat, first, count: -first  # noqa: E731
    for local_size in [n for n in (1, 2, 4) if world_size % n == 0]:
        shape = topology.build(group, local_size, "ring")
        cases = [
            (torch.float32, SDP4BitConfig(), None),
            (torch.bfloat16, SDP4BitConfig(max_buffer_mib=1), reverse),
            (torch.float16, SDP4BitConfig(weight_group_size=2048), None),
            (torch.bfloat16, SDP4BitConfig(weight_bits=16), None),
            (torch.bfloat16, SDP4BitConfig(weight_bits=8, weight_difference=False), None),
        ]
        for dtype, config, priority in cases:
            traffic = Traffic()
            ring = DifferenceRing(shape, config, traffic, numels, torch.device("cpu"), priority)
            assert ring.buffer_bytes <= config.max_buffer_mib << 20
            assert sorted(ring.order) == list(range(len(ring.chunks)))
            if local_size == 1:
                assert len(ring.chunks) > 3 * world_size, "no flat tensor was cut"
            flats = [contribution(7, i, world_size * n, dtype) for i, n in enumerate(numels)]
            expected, gathered = [flat.clone() for flat in flats], [flat.clone() for flat in flats]
            gather = DifferenceGather(shape, config, Traffic(), numels)
            for step in range(3):
                new = [contribution(20 + step, i, world_size * n, dtype) for i, n in enumerate(numels)]
                own = [flat.view(world_size, -1)[rank] for flat in flats]
                blocks = ring.encode([x.view(world_size, -1)[rank] for x in new], own)
                done = list(ring.run(blocks, flats))
                assert done == list(range(1, len(ring.chunks) + 1))
                for held, goal in zip(expected, new, strict=True):
                    renew_alone(held.view(world_size, -1), goal.view(world_size, -1), ring, config)
                own = [flat.view(world_size, -1)[rank] for flat in gathered]
                blocks = gather.encode([x.view(world_size, -1)[rank] for x in new], own)
                on_the_way = blocks[3].shape[1] * ((local_size + 1) * shape.num_nodes + 1)
                assert on_the_way <= config.max_buffer_mib << 20
                small = config.max_buffer_mib == 1
                assert len(blocks[3]) == 1 or small
                assert len(blocks[3]) == 2 or not small or world_size < 4 or local_size == 4, "it was to be cut"
                list(gather.run(blocks, gathered))
                for flat, other, held in zip(flats, gathered, expected, strict=True):
                    assert torch.equal(flat, held), (local_size, dtype, config, step)
                    assert torch.equal(other, held), (local_size, dtype, config, step)
            check_traffic_of_weights(shape, config, traffic, sum(numels) * world_size, 1 + 1 / world_size)
            check_traffic_of_weights(shape, config, gather.traffic, sum(numels) * world_size, 1.0)


def renew_alone(held, goal, ring, config) -> None:
    """What all ranks' shards become, part by part."""
    for shard, target in zip(held, goal, strict=True):
        part = max(1, next(cut.part for cut in ring._cuts if cut.numel == shard.numel()))
        for first in range(0, shard.numel(), part):
            x, old = target[first : first + part], shard[first : first + part]
            if config.weight_bits == 16:
                old.copy_(x.bfloat16())
                continue
            subtract = old.float() if config.weight_difference else None
            block = codec.quantize(
                x.float() if x.dtype == torch.float16 else x,
                config.weight_bits,
                config.weight_group_size,
                subtract=subtract.to(x.dtype) if subtract is not None and x.dtype != torch.float16 else subtract,
                backend="torch",
            )
            out = old.float() if x.dtype == torch.float16 else old.clone()
            add = config.weight_difference
            codec.dequantize(
                block,
                x.numel(),
                config.weight_bits,
                config.weight_group_size,
                out=out,
                add=add,
                backend="torch",
            )
            old.copy_(out)


def check_traffic_of_weights(shape, config, traffic, total: int, inside: float) -> None:
    bits = config.weight_bits + (0 if config.weight_bits == 16 else 32 / config.weight_group_size)
    world_size, nodes, local = shape.world_size, shape.num_nodes, shape.local_size
    inter = 3 * total * bits / 8 * (nodes - 1) / world_size
    # A link carries all chunks but those that its far end owns; parts are whole groups.
    assert traffic.weight_inter <= 1.1 * inter + 3 * 3 * world_size * 2048
    assert bool(traffic.weight_inter) == (nodes > 1)
    if local > 1:
        intra = 3 * total * bits / 8 * (local - 1) / local * inside
        assert 0.9 * intra < traffic.weight_intra < 1.1 * intra + 3 * 3 * world_size * 2048


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
        sizes = [5000 + d for d in range(world_size)]
        out = collectives.reduce_scatter(blocks_in_one(rank, sizes, torch.bfloat16), sizes, torch.empty(5000 + rank))
        held = torch.cat([contribution(9, d, 3000, torch.bfloat16) for d in range(world_size)])
        ring = DifferenceRing(shape, collectives.config, collectives.traffic, [3000], held.device)
        own = held.view(world_size, -1)[rank]
        list(ring.run(ring.encode([own * 1.01], [own]), [held]))
        outs.append((out, held))
    assert torch.equal(outs[0][0], outs[1][0])
    assert torch.equal(outs[0][1], outs[1][1])


def die_in_the_middle(group) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    collectives = QuantizedCollectives(topology.build(group, 2), SDP4BitConfig())
    for call in range(5):
        if rank == 1 and call == 2:
            os._exit(7)
        collectives.reduce_scatter(torch.ones(world_size << 16), [1 << 16] * world_size, torch.empty(1 << 16))


def main() -> None:
    dist.init_process_group("gloo")
    group, results = dist.group.WORLD, {}
    if sys.argv[1:] == ["die"]:
        return die_in_the_middle(group)
    check_reduce_scatter(group, results)
    if dist.get_world_size() > 1:
        check_queue(group)
    check_traffic(group, results)
    check_stochastic_rounding_is_unbiased(group)
    check_bad_values_reach_the_owner(group)
    check_secondary_shards(group)
    check_ring(group)
    check_gather_sum(group)
    check_backends_agree(group)
    torch.save(results, os.environ["RESULT"])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
