"""Seconds of a training step of sharded data parallelism: an alpha-beta model with the links of nodes and ranks.

A collective is a list of phases, one after the other. A phase takes the bytes of its busiest link over that link's
rate, whichever of node and rank is slower, plus a latency for each message that waits for the one before, plus the
codec's bytes over its rate and its launches. Ways to communicate (`WAYS`):

    deepspeed        ZeRO-1/2: bfloat16 ring all-reduce of each bucket, bfloat16 all-gather of weights
    deepspeed_reduce the same with buckets reduced to their owners alone
    megatron         float32 reduce-scatter, bfloat16 all-gather
    bf16, bf16_two_level   our collectives with 16 bits, flat and in two levels
    zeropp           int8 weights, int4 + int4 gradients in two levels, buckets waiting for each other
    sdp4bit          8 bits inside the node bucket by bucket; 4 bits between nodes, all buckets in one balanced exchange
                     at the end of backward; 4-bit weight differences between nodes, then inside
    sdp4bit_incast   the same, but each bucket goes to the ranks that own it at once
    sdp4bit_relay    each bucket is split evenly over nodes at once, and sums go on to their owners with 8 bits
    sdp4bit_spread   each bucket is split evenly over nodes at once; sums wait for the end of backward and go on to
                     their owners in one balanced exchange with 8 bits: a design that nobody has built
    sdp4bit_paper    as published: balanced, weights gathered in one flat ring

Steps with overlap, and FSDP: comm_step.py. Left out: jitter and stragglers, compute that communication slows down,
congestion in the switches, optimizer time. Source of the formulas: docs/communication.md and rl_accel/comm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

BF16 = 16.0
FP32 = 32.0


@dataclass(frozen=True)
class Cluster:
    """Nodes, their links and what a rank needs for the codec."""

    nodes: int
    ranks: int
    """A node."""
    inter: float
    """Bytes a second that a node's link carries each way."""
    intra: float
    """Bytes a second that a rank sends to others of its node."""
    inter_latency: float = 10e-6
    intra_latency: float = 3e-6
    ring_share: float = 0.85
    """Of `inter`, reached by rings: one flow a link."""
    mesh_share: float = 0.85
    """Of `inter`, reached where several flows share a link."""
    codec: float = 1.5e12
    """Bytes a second that the codec of a rank reads and writes."""
    launch: float = 10e-6
    """Seconds a kernel of the codec costs beside its bytes."""
    burst: float = 0.0
    """Bytes that an idle link lets through at once: a token bucket."""
    host: float = math.inf
    """Bytes a second that one machine moves for all ranks, where it stands in for all nodes."""

    @property
    def world(self) -> int:
        return self.nodes * self.ranks


@dataclass(frozen=True)
class Phase:
    """Part of a collective; bytes of the busiest link."""

    inter: float = 0.0
    """A node's link carries these one way."""
    intra: float = 0.0
    """A rank sends or receives these inside its node."""
    messages: int = 0
    """That wait for each other, between nodes."""
    intra_messages: int = 0
    ring: bool = False
    codec: float = 0.0
    """Bytes that a rank's codec reads and writes."""
    launches: int = 0
    moved: float | None = None
    """Bytes that all ranks send together; None: every link is as busy as the busiest."""

    def seconds(self, cluster: Cluster) -> float:
        rate = cluster.inter * (cluster.ring_share if self.ring else cluster.mesh_share)
        link = max(max(0.0, self.inter - cluster.burst) / rate, self.intra / cluster.intra)
        latency = self.messages * cluster.inter_latency + self.intra_messages * cluster.intra_latency
        moved = self.moved
        if moved is None:
            moved = cluster.nodes * self.inter + cluster.world * self.intra
        return link + latency + moved / cluster.host + self.codec / cluster.codec + self.launches * cluster.launch


Phases = list[Phase]


def total(phases: Sequence[Phase], cluster: Cluster) -> float:
    return sum(phase.seconds(cluster) for phase in phases)


@dataclass(frozen=True)
class Workload:
    """A model and how it is trained; compute is 6 P tokens / (peak * mfu), a third of it forward."""

    parameters: float
    tokens: float = 8192
    """A rank and optimizer step."""
    peak: float = 989e12
    mfu: float = 0.4
    bucket: float = 500e6
    """Values of gradients that are reduced together."""
    buckets: tuple[float, ...] = ()
    """Values of each bucket, where they are known; else as `bucket` says."""
    micro_batches: int = 1
    layers: int = 32
    """Units of FSDP."""
    overlap_gradients: bool = True
    overlap_weights: bool = False
    """With the next forward; ours only."""
    max_buffer_mib: int = 512
    compute_s: float | None = None
    """Measured compute instead of the formula."""

    @property
    def compute(self) -> float:
        if self.compute_s is not None:
            return self.compute_s
        return 6 * self.parameters * self.tokens / (self.peak * self.mfu)

    @property
    def bucket_sizes(self) -> tuple[float, ...]:
        if self.buckets:
            return self.buckets
        count = max(1, math.ceil(self.parameters / self.bucket))
        return (self.parameters / count,) * count


@dataclass(frozen=True)
class Plan:
    """What a way sends in a step."""

    buckets: list[Phases]
    """Of gradients: what can run while backward goes on, bucket by bucket."""
    weights: list[Phases]
    """Chunks, in the order in which forward needs them."""
    tail: Phases = field(default_factory=list)
    """Of gradients, after the last bucket."""
    overlaps_weights: bool = False

    def gradients_s(self, cluster: Cluster) -> float:
        """Seconds in the collectives of gradients, if nothing overlapped."""
        return sum(total(phases, cluster) for phases in self.buckets) + total(self.tail, cluster)

    def weights_s(self, cluster: Cluster) -> float:
        return sum(total(phases, cluster) for phases in self.weights)


def coded(bits: float, group: int = 128) -> float:
    """Bits a value takes with its share of a float32 scale; 16 and more have none."""
    return bits if bits >= BF16 else bits + 32 / group


def ring(cluster: Cluster, values: float, bits: float, trips: int = 1) -> Phase:
    """Flat ring over all ranks in node order: all-gather or reduce-scatter; an all-reduce is two trips, and a tree
    where that has fewer steps."""
    size = trips * (cluster.world - 1) / cluster.world * values * bits / 8
    steps = cluster.nodes - 1
    if trips == 2 and cluster.nodes > 1:
        steps = min(steps, 2 * math.ceil(math.log2(cluster.nodes)))
    return Phase(
        inter=size if cluster.nodes > 1 else 0.0,
        intra=size if cluster.ranks > 1 else 0.0,
        messages=trips * steps,
        intra_messages=trips * steps * (cluster.ranks - 1),
        ring=True,
        moved=cluster.world * size,
    )


def intra_ring(cluster: Cluster, values: float, bits: float) -> Phase:
    """All-gather or reduce-scatter inside every node; `values` is what a rank has in the end."""
    return Phase(
        intra=(cluster.ranks - 1) / cluster.ranks * values * bits / 8, intra_messages=cluster.ranks - 1, ring=True
    )


def exchange(cluster: Cluster, values: float, bits: float, codec: float = 0.0, launches: int = 0) -> Phase:
    """All-to-all between counterparts of all nodes, balanced; `values` is what a rank has to send out at first."""
    size = (cluster.nodes - 1) / cluster.nodes * values * bits / 8
    return Phase(inter=cluster.ranks * size, messages=cluster.nodes - 1, codec=codec, launches=launches)


def hop_one(cluster: Cluster, values: float, intra_bits: float, inter_bits: float, received: float = 0.0) -> Phase:
    """Encode, send inside the node, and requantize; `received`: values of the busiest place if not an even share."""
    if cluster.ranks == 1:
        return Phase(codec=values * (BF16 + inter_bits) / 8, launches=2)
    share = received or values / cluster.ranks
    codes = (BF16 + 2 * intra_bits + inter_bits / cluster.ranks) / 8
    return Phase(
        intra=(cluster.ranks - 1) * share * intra_bits / 8,
        intra_messages=cluster.ranks - 1,
        codec=values * codes,
        launches=3,
    )


def decode_sum(cluster: Cluster, values: float, bits: float) -> Phase:
    """Sum what all nodes sent for this rank's share of `values`."""
    return Phase(codec=values * (bits / cluster.ranks + FP32 / cluster.world) / 8, launches=1)


def gather_difference(cluster: Cluster, values: float, bits: float) -> Phases:
    """Weights: between nodes first, then inside; every rank decodes all of them."""
    encode = values / cluster.world * (2 * BF16 + bits) / 8
    decode = values * (bits + 2 * BF16) / 8
    inter = (cluster.nodes - 1) / cluster.nodes * values * bits / 8
    phases = [Phase(inter=inter, messages=cluster.nodes - 1, codec=encode, launches=1, ring=cluster.ranks == 1)]
    return [*phases, intra_ring(cluster, values, bits), Phase(codec=decode, launches=1)]


def owned(sizes: Sequence[float], owners: int) -> list[dict[int, float]]:
    """Return of each bucket how many of its values every owner keeps; owners have equal, contiguous partitions, and
    buckets come from the last parameter to the first."""
    partition = sum(sizes) / owners
    end, found = sum(sizes), []
    for size in sizes:
        start, parts = end - size, {}
        first, last = int(start // partition), min(owners - 1, int(max(start, end - 1e-9) // partition))
        for owner in range(max(0, first), last + 1):
            part = min(end, (owner + 1) * partition) - max(start, owner * partition)
            if part > 0:
                parts[owner] = part
        found.append(parts)
        end = start
    return found


def deepspeed(cluster: Cluster, work: Workload) -> Plan:
    return Plan(
        [[ring(cluster, size, BF16, trips=2)] for size in work.bucket_sizes],
        [[ring(cluster, work.parameters, BF16)]],
    )


def deepspeed_reduce(cluster: Cluster, work: Workload) -> Plan:
    """Each slice of a bucket is reduced to its owner over all ranks: in a ring, then gathered, as gloo does it."""
    buckets = []
    for parts in owned(work.bucket_sizes, cluster.world):
        phases = []
        for size in parts.values():
            outside = (cluster.nodes - 1) / cluster.nodes * size * BF16 / 8
            phases += [ring(cluster, size, BF16), Phase(inter=outside, messages=1, moved=outside)]
        buckets.append(phases)
    return Plan(buckets, [[ring(cluster, work.parameters, BF16)]])


def _into_owners(cluster: Cluster, parts: dict[int, float], bits: float, sources: int) -> Phase:
    """All `sources` (ranks, or nodes whose ranks share the work) send to the owners of a bucket at the same time."""
    per_node: dict[int, float] = {}
    for rank, count in parts.items():
        node = rank // cluster.ranks
        per_node[node] = per_node.get(node, 0.0) + count
    outside = sources * (cluster.nodes - 1) / cluster.nodes
    received = max(per_node.values()) * outside * bits / 8
    moved = sum(per_node.values()) * outside * bits / 8
    sent = moved / cluster.nodes
    return Phase(inter=max(received, sent), messages=cluster.nodes - 1, moved=moved)


def megatron(cluster: Cluster, work: Workload) -> Plan:
    return Plan([[ring(cluster, size, FP32)] for size in work.bucket_sizes], [[ring(cluster, work.parameters, BF16)]])


def bf16_flat(cluster: Cluster, work: Workload) -> Plan:
    """Reduce-scatter by one all-to-all over all ranks."""
    flat = replace(cluster, nodes=cluster.world, ranks=1)
    buckets = []
    for size in work.bucket_sizes:
        sent = size * BF16 / 8 / cluster.world
        outside, inside = cluster.world - cluster.ranks, cluster.ranks - 1
        phase = Phase(inter=cluster.ranks * outside * sent, intra=inside * sent, messages=outside)
        buckets.append([hop_one(flat, size, BF16, BF16), phase, decode_sum(flat, size, BF16)])
    codec = Phase(codec=work.parameters * 2 * BF16 / 8, launches=2)
    return Plan(buckets, [[ring(cluster, work.parameters, BF16), codec]])


def two_level(
    intra: float, inter: float, weights: float, group: int = 128, weight_group: int = 128, flat_weights: bool = False
) -> Callable[[Cluster, Workload], Plan]:
    """Balanced two-level gradients whose buckets wait for each other, and weights in few bits."""
    intra_bits, inter_bits, weight_bits = coded(intra, group), coded(inter, group), coded(weights, weight_group)

    def make(cluster: Cluster, work: Workload) -> Plan:
        hop_two = exchange(cluster, work.parameters / cluster.ranks, inter_bits)
        chunks = _chunks(work.parameters / cluster.ranks * inter_bits / 8, work)
        hop_two = replace(hop_two, messages=hop_two.messages * chunks)
        tail = [hop_two, decode_sum(cluster, work.parameters, inter_bits)]
        buckets = [[hop_one(cluster, size, intra_bits, inter_bits)] for size in work.bucket_sizes]
        chunks = _chunks(work.parameters * weight_bits / 8, work)
        part = work.parameters / chunks
        if flat_weights:
            codec = Phase(codec=part * (weight_bits + 2 * BF16) / 8, launches=2)
            gather = [ring(cluster, part, weight_bits), codec]
        else:
            gather = gather_difference(cluster, part, weight_bits)
        return Plan(buckets, [gather] * chunks, tail, overlaps_weights=work.overlap_weights)

    return make


def _chunks(size: float, work: Workload) -> int:
    return max(1, math.ceil(size / (work.max_buffer_mib << 20)))


def to_owners_at_once(cluster: Cluster, work: Workload) -> Plan:
    """Gradients of 8 and 4 bits whose slices go to their owners bucket by bucket."""
    intra, inter = coded(8), coded(4)
    buckets = []
    for size, parts in zip(work.bucket_sizes, owned(work.bucket_sizes, cluster.world), strict=True):
        places = [0.0] * cluster.ranks
        for rank, count in parts.items():
            places[rank % cluster.ranks] += count
        first = hop_one(cluster, size, intra, inter, received=max(places))
        buckets.append([first, _into_owners(cluster, parts, inter, cluster.nodes), decode_sum(cluster, size, inter)])
    return replace(two_level(8, 4, 4)(cluster, work), buckets=buckets, tail=[])


def spread(at_once: bool) -> Callable[[Cluster, Workload], Plan]:
    """Gradients of 8 and 4 bits whose buckets are split evenly over nodes; sums go on to their owners with each bucket,
    or in one balanced exchange in the end."""

    def make(cluster: Cluster, work: Workload) -> Plan:
        intra, inter = coded(8), coded(4)
        buckets: list[Phases] = []
        for size, parts in zip(work.bucket_sizes, owned(work.bucket_sizes, cluster.world), strict=True):
            phases = [hop_one(cluster, size, intra, inter), exchange(cluster, size / cluster.ranks, inter)]
            phases.append(decode_sum(cluster, size, inter))
            if at_once:
                codec = size / cluster.world * (FP32 + intra) / 8
                phases.append(replace(_into_owners(cluster, parts, intra, 1), codec=codec, launches=2))
            buckets.append(phases)
        share = work.parameters / cluster.world
        on = exchange(cluster, share, intra, codec=share * (FP32 + intra) / 8, launches=2)
        return replace(two_level(8, 4, 4)(cluster, work), buckets=buckets, tail=[] if at_once else [on])

    return make


WAYS: dict[str, Callable[[Cluster, Workload], Plan]] = {
    "deepspeed": deepspeed,
    "deepspeed_reduce": deepspeed_reduce,
    "megatron": megatron,
    "bf16": bf16_flat,
    "bf16_two_level": two_level(16, 16, 16),
    "zeropp": two_level(4, 4, 8, group=2048, weight_group=2048),
    "sdp4bit": two_level(8, 4, 4),
    "sdp4bit_incast": to_owners_at_once,
    "sdp4bit_relay": spread(at_once=True),
    "sdp4bit_spread": spread(at_once=False),
    "sdp4bit_paper": two_level(8, 4, 4, weight_group=2048, flat_weights=True),
}
