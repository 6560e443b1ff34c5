"""Steps made of the collectives of comm_model.py: what overlaps with compute, FSDP2, memory, and the bypass' choice.

ZeRO: gradients of a bucket go out when backward has made them, one bucket after the other, beside the rest of backward
of the last micro-batch; `tail` follows. Weights are gathered after the optimizer, or chunk by chunk beside the next
forward. FSDP2 (`FSDP_WAYS`): gathers and reduce-scatters of every micro-batch run beside its compute, and the first and
last unit's are not hidden:

    fsdp            sharded over all ranks: a bfloat16 gather in forward and one in backward, float32 reduce-scatter
    hsdp            sharded inside nodes; gradients all-reduced between nodes in float32 (verl's default dtype)
    fsdp_sdp4bit    4-bit differences between nodes, once a step, into a shard inside the node; bfloat16 gathers inside
                    it; gradients in 8 and 4 bits
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from comm_model import (
    BF16,
    FP32,
    WAYS,
    Cluster,
    Phase,
    Plan,
    Workload,
    coded,
    decode_sum,
    exchange,
    hop_one,
    intra_ring,
    ring,
    total,
)

FSDP_WAYS = ("fsdp", "hsdp", "fsdp_sdp4bit")
WHATS = ("gradients", "weights")


@dataclass(frozen=True)
class Step:
    """A predicted step, in seconds."""

    step_s: float
    compute_s: float
    gradients_s: float
    """In the collectives, hidden or not."""
    weights_s: float

    @property
    def exposed_s(self) -> float:
        """Communication that compute does not hide."""
        return self.step_s - self.compute_s


def in_turn(ready: Sequence[float], seconds: Sequence[float]) -> float:
    """Return when the last of some transfers ends that share a link and start when they are ready."""
    end = 0.0
    for start, took in zip(ready, seconds, strict=True):
        end = max(end, start) + took
    return end


def step_of(plan: Plan, cluster: Cluster, work: Workload) -> Step:
    """Predict a step of ZeRO-1."""
    gradients, weights = plan.gradients_s(cluster), plan.weights_s(cluster)
    forward, backward = work.compute / 3, 2 * work.compute / 3
    last = backward / work.micro_batches
    if work.overlap_gradients:
        buckets = [total(phases, cluster) for phases in plan.buckets]
        sizes = work.bucket_sizes
        made = [sum(sizes[: index + 1]) / sum(sizes) * last for index in range(len(sizes))]
        end = backward - last + in_turn(made, buckets) + total(plan.tail, cluster)
    else:
        end = backward + gradients
    if plan.overlaps_weights:
        chunks = [total(phases, cluster) for phases in plan.weights]
        first = forward / work.micro_batches
        there = [sum(chunks[: index + 1]) for index in range(len(chunks))]
        end += in_turn(there, [first / len(chunks)] * len(chunks)) + forward - first
    else:
        end += weights + forward
    return Step(end, work.compute, gradients, weights)


def zero_step(way: str, cluster: Cluster, work: Workload) -> Step:
    return step_of(WAYS[way](cluster, work), cluster, work)


def quantized_is_chosen(quantized_s: float, plain_s: float) -> bool:
    """The rule of `rl_accel.comm.bypass.Bypass`: quantized where it takes no longer."""
    return quantized_s <= plain_s


def choices(cluster: Cluster, work: Workload, way: str = "sdp4bit", plain: str = "deepspeed") -> dict[str, bool]:
    """Return for gradients and weights whether `bypass=auto` would quantize them on this link."""
    times = [
        (plan.gradients_s(cluster), plan.weights_s(cluster))
        for plan in (WAYS[way](cluster, work), WAYS[plain](cluster, work))
    ]
    return {what: quantized_is_chosen(ours, theirs) for what, ours, theirs in zip(WHATS, *times, strict=True)}


def auto_step(cluster: Cluster, work: Workload) -> Step:
    """Predict a step of `sdp4bit` with `bypass=auto`, after it has chosen."""
    chosen = choices(cluster, work)
    plans = {what: WAYS["sdp4bit" if chosen[what] else "deepspeed"](cluster, work) for what in WHATS}
    gradients, weights = plans["gradients"], plans["weights"]
    both = replace(gradients, weights=weights.weights, overlaps_weights=weights.overlaps_weights)
    return step_of(both, cluster, work)


def _in_units(phase: Phase, units: int) -> Phase:
    return replace(
        phase,
        messages=phase.messages * units,
        intra_messages=phase.intra_messages * units,
        launches=phase.launches * units,
    )


def fsdp_step(way: str, cluster: Cluster, work: Workload) -> Step:
    """Predict a step of FSDP2 whose units are freed after forward."""
    values, once = work.parameters, 0.0
    if way == "fsdp":
        gather, reduce = [ring(cluster, values, BF16)], [ring(cluster, values, FP32)]
    elif way == "hsdp":
        columns = replace(cluster, ranks=1)
        gather = [intra_ring(cluster, values, BF16)]
        reduce = [intra_ring(cluster, values, FP32), ring(columns, values, FP32, trips=2)]
    elif way == "fsdp_sdp4bit":
        gather = [intra_ring(cluster, values, BF16)]
        inter_bits = coded(4)
        hop_two = exchange(cluster, values / cluster.ranks, inter_bits)
        reduce = [hop_one(cluster, values, coded(8), inter_bits), hop_two, decode_sum(cluster, values, inter_bits)]
        size = (cluster.nodes - 1) / cluster.nodes * values * inter_bits / 8
        codec = values / cluster.ranks * (inter_bits + 2 * BF16) / 8
        once = Phase(inter=size, messages=cluster.nodes - 1, codec=codec, launches=2).seconds(cluster)
    else:
        raise ValueError(f"ways of FSDP are {', '.join(FSDP_WAYS)}; got {way!r}")
    gather_s = total([_in_units(phase, work.layers) for phase in gather], cluster)
    reduce_s = total([_in_units(phase, work.layers) for phase in reduce], cluster)
    forward, backward = (share * work.compute / work.micro_batches / 3 for share in (1, 2))
    one = max(forward, gather_s) + max(backward, gather_s + reduce_s) + (2 * gather_s + reduce_s) / work.layers
    micro = work.micro_batches
    return Step(once + micro * one, work.compute, micro * reduce_s, once + 2 * micro * gather_s)


def memory_bytes(way: str, cluster: Cluster, parameters: float) -> float:
    """Return the bytes a rank needs for weights, gradients, optimizer and what communication keeps, without activations
    and buffers."""
    if way == "fsdp":
        return 16 * parameters / cluster.world
    if way == "hsdp":
        return 16 * parameters / cluster.ranks
    if way == "fsdp_sdp4bit":
        return 16 * parameters / cluster.world + 2 * parameters / cluster.ranks
    queue = coded(4) / 8 * parameters / cluster.ranks if way.startswith("sdp4bit") else 0.0
    return 4 * parameters + 12 * parameters / cluster.world + queue
