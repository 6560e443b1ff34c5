"""The model of comm_model.py against measured steps of bench_comm.py: nodes are network namespaces of one machine.

Known and not fitted: the rates, headers of Ethernet and TCP, the token buckets' bursts, the parameters of TinyGPT and
how DeepSpeed fills its buckets with them. Compute is an input, as in the bench's own bound: the least `compute_s` of
the arms at that rate, which contains waiting for other ranks. Fitted are the five constants of `Machine`, on the files
`FITTED_ON`: the one with all arms and rates, and the one with the most ranks. All other files are judged, though not
blindly: the shape of the model was chosen with them in sight.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from comm_model import WAYS, Cluster, Plan, Workload, coded, owned, total

CORES = 2
HEADERS = 1514 / 1448
"""Bytes of an Ethernet frame for each byte of a TCP segment."""
BURST_MS, MIN_BURST = 4, 16 * 1024
"""Of slow_network.py."""
GEOMETRY = {
    "comm-cpu.json": (2, 2, 1, 256),
    "comm-incumbent-cpu.json": (2, 2, 1, 256),
    "comm-buckets-6x1-cpu.json": (6, 1, 1, 128),
    "comm-buckets-6x8-cpu.json": (6, 1, 8, 128),
    "comm-buckets-6x8-round-robin-cpu.json": (6, 1, 8, 128),
    "comm-buckets-12x13-cpu.json": (12, 1, 13, 128),
}
"""Nodes, ranks a node, buckets and width of results whose rows do not say it."""
BALANCED = ("comm-balanced-2x2-cpu.json", "comm-balanced-8x8-cpu.json", "comm-balanced-12x13-cpu.json")
"""Results of the design with one balanced exchange. They came after the model and its constants."""
FITTED_ON = ("comm-cpu.json", "comm-buckets-12x13-cpu.json")
_ROW = re.compile(r"comm\.step_s\.(?:(\d+)x(\d+)\.(\d+)b\.)?(none|[\d.]+[kmg]bit)(?:\.(\w+))?$")
_UNITS = {"k": 1e3, "m": 1e6, "g": 1e9}
_BEFORE_QUEUE = {"sdp4bit": "sdp4bit_incast", "sdp4bit_auto": "sdp4bit_incast"}


@dataclass(frozen=True)
class Machine:
    """What was fitted."""

    ring_share: float = 0.987
    """Of the rate, one TCP flow a link."""
    mesh_share: float = 0.749
    """Of the rate, several flows that share a link."""
    host: float = 0.756e9
    """Bytes a second that a core sends and receives."""
    codec: float = 3.77e9
    """Bytes a second that the codec of a core reads and writes."""
    turn: float = 0.35e-3
    """Seconds that a rank which a message wakes waits for each other rank on its core."""


@dataclass(frozen=True)
class Measured:
    """A step that was measured."""

    file: str
    arm: str
    way: str
    nodes: int
    ranks: int
    buckets: int
    width: int
    rate: str
    step_s: float
    compute_s: float
    gradients_s: float | None = None
    weights_s: float | None = None

    @property
    def name(self) -> str:
        return f"{self.file.removesuffix('.json')} {self.nodes}x{self.ranks}.{self.buckets}b.{self.rate}.{self.arm}"


def parameter_sizes(width: int, layers: int = 4, length: int = 32, vocabulary: int = 64) -> list[int]:
    """Return the values of each parameter of TinyGPT, in its order."""
    block = [width] * 4 + [3 * width**2, width**2, 4 * width**2, 4 * width, 4 * width**2, width]
    return [vocabulary * width, length * width, *block * layers, width, width, vocabulary * width]


def bucket_sizes(sizes: Sequence[int], limit: float) -> tuple[float, ...]:
    """Return the values of DeepSpeed's buckets: whole parameters, the last first, as many as fit into the limit."""
    found: list[float] = [0.0]
    for size in reversed(sizes):
        if found[-1] and found[-1] + size > limit:
            found.append(0.0)
        found[-1] += size
    return tuple(found)


def workload(row: Measured) -> Workload:
    sizes = parameter_sizes(row.width)
    limit = math.inf if row.buckets == 1 else 12 * 4 * row.width**2 // row.buckets
    return Workload(sum(sizes), buckets=bucket_sizes(sizes, limit), compute_s=row.compute_s)


def cluster(row: Measured, machine: Machine) -> Cluster:
    rate = math.inf if row.rate == "none" else float(row.rate[:-4]) * _UNITS[row.rate[-4]] / 8
    burst = math.inf if row.rate == "none" else max(MIN_BURST, rate * BURST_MS / 1000)
    return Cluster(
        row.nodes,
        row.ranks,
        inter=rate / HEADERS,
        intra=math.inf,
        inter_latency=machine.turn * (row.nodes * row.ranks / CORES - 1),
        intra_latency=0.0,
        ring_share=machine.ring_share,
        mesh_share=machine.mesh_share,
        codec=machine.codec * CORES / (row.nodes * row.ranks),
        launch=0.0,
        burst=burst / HEADERS,
        host=machine.host * CORES,
    )


def plan(row: Measured, machine: Machine) -> Plan:
    return WAYS[row.way](cluster(row, machine), workload(row))


def run_ahead_s(parts: Sequence[dict[int, float]], cluster: Cluster, bits: float) -> float:
    """Seconds until all ranks have what they own, one rank a node, where only receivers of a bucket wait for it.

    A message smaller than a socket's buffers is off a sender's hands at once, so ranks that own nothing of a bucket go
    on to the next one. Links serve what comes first.
    """
    rate = cluster.inter * cluster.mesh_share
    ready, outgoing, incoming = ([0.0] * cluster.nodes for _ in range(3))
    for bucket in parts:
        ends = list(ready)
        pairs = [(rank, owner) for owner in bucket for rank in range(cluster.nodes) if rank != owner]
        for sender, owner in sorted(pairs, key=lambda pair: (ready[pair[0]], (pair[1] - pair[0]) % cluster.nodes)):
            seconds = bucket[owner] * bits / 8 / rate
            outgoing[sender] = max(outgoing[sender], ready[sender] - cluster.burst / rate) + seconds
            start = max(incoming[owner], ready[sender] - cluster.burst / rate)
            incoming[owner] = max(start + seconds, outgoing[sender])
            ends[owner] = max(ends[owner], incoming[owner])
        for owner in bucket:
            ends[owner] += (cluster.nodes - 1) * cluster.inter_latency
        ready = ends
    return max(ready)


def predicted_s(row: Measured, machine: Machine) -> float:
    """Return the seconds of a step; nothing overlaps in these benches."""
    return row.compute_s + sum(parts_s(row, machine))


def parts_s(row: Measured, machine: Machine) -> tuple[float, float]:
    """Return the seconds in the collectives of gradients and of weights."""
    made, link, work = plan(row, machine), cluster(row, machine), workload(row)
    gradients = made.gradients_s(link)
    if row.way == "sdp4bit_incast" and row.ranks == 1 and math.isfinite(link.inter):
        parts = owned(work.bucket_sizes, row.nodes)
        waited = sum(total([phase], link) for phases in made.buckets for phase in phases if phase.inter)
        gradients += run_ahead_s(parts, link, coded(4)) - waited
    return gradients, made.weights_s(link)


def fit(rows: Sequence[Measured], machine: Machine = Machine()) -> Machine:
    """Return constants that minimize the squares of the logarithmic errors, by steps along one constant at a time."""

    def loss(candidate: Machine) -> float:
        return sum(math.log(predicted_s(row, candidate) / row.step_s) ** 2 for row in rows if row.arm != "sdp4bit_auto")

    best, step = loss(machine), 0.1
    while step > 0.001:
        before = best
        for name, factor in product(vars(machine), (1 + step, 1 / (1 + step))):
            candidate = replace(machine, **{name: getattr(machine, name) * factor})
            if max(candidate.ring_share, candidate.mesh_share) <= 1 and (found := loss(candidate)) < best:
                best, machine = found, candidate
        if best == before:
            step /= 2
    return machine


def read(path: Path, width: int = 128) -> list[Measured]:
    """Return what a results file measured, each incumbent once. Files that are not in `GEOMETRY` must name nodes, ranks
    and buckets in their rows, and are of the design with one balanced exchange; `width` is that of their model."""
    found: list[Measured] = []
    for row in json.loads(path.read_text()):
        if not (match := _ROW.match(row["name"])):
            continue
        nodes, ranks, buckets, rate, arm = match.groups()
        arm = arm or "sdp4bit"
        if path.name in GEOMETRY:
            shape, way = GEOMETRY[path.name], _BEFORE_QUEUE.get(arm, arm)
        elif nodes is None:
            raise ValueError(f"{path.name}: {row['name']} does not say nodes, ranks and buckets")
        else:
            shape = int(nodes), int(ranks), int(buckets), row.get("width", width)
            way = "chosen" if arm == "sdp4bit_auto" else arm  # no way of its own; its compute counts
        parts = row.get("compute_s") or math.inf, row.get("gradients_s"), row.get("weights_s")
        found.append(Measured(path.name, arm, way, *shape, rate, row["value"], *parts))
        incumbent = row.get("incumbent_arm") or "deepspeed"
        found.append(Measured(path.name, incumbent, incumbent, *shape, rate, row["incumbent"], math.inf))
    return _with_compute(found)


def _with_compute(rows: list[Measured]) -> list[Measured]:
    least: dict[tuple, float] = {}
    for row in rows:
        key = row.nodes, row.ranks, row.buckets, row.width, row.rate
        least[key] = min(least.get(key, math.inf), row.compute_s)
    unique = {}
    for row in rows:
        if row.way in WAYS:
            compute = least[row.nodes, row.ranks, row.buckets, row.width, row.rate]
            unique[row.name] = replace(row, compute_s=compute)
    return list(unique.values())
