"""In which order chunks travel around a ring of nodes so that each reaches all of them.

Every link carries every chunk but those that its far end owns, once: the traffic of a ring all-gather, whoever owns
what. In each slot a node passes on the most urgent chunk that it has and its successor lacks, so chunks arrive in the
order in which the next forward pass reads them and no link idles while it has something to carry. All nodes work the
same schedule out by themselves; nothing is negotiated while it runs. Source: ours.

Cost: O(chunks * nodes * log chunks), once.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class NodeSchedule:
    """What one node does, slot by slot; None: nothing."""

    send: tuple[int | None, ...]
    """Chunk to pass on to the next node."""
    receive: tuple[int | None, ...]
    """Chunk that the previous node passes on."""
    max_stored: int
    """Chunks of other nodes that were received and wait to be passed on, at most."""


def make_schedule(owners: Sequence[int], num_nodes: int, max_stored: int) -> list[NodeSchedule]:
    """Schedule chunks 0, 1, ..., the most urgent first.

    Args:
        owners: the node that has a chunk at first, chunk by chunk.
        num_nodes: nodes, in the order of the ring.
        max_stored: chunks that a node should keep waiting at most; exceeded only where nothing could move otherwise.
    """
    ready: list[list[int]] = [[] for _ in range(num_nodes)]
    for chunk, owner in enumerate(owners):
        ready[owner].append(chunk)  # in rising order: a heap already
    stored, most = [0] * num_nodes, [0] * num_nodes
    sends: list[list[int | None]] = [[] for _ in range(num_nodes)]
    left = len(owners) * (num_nodes - 1)
    while left:
        slot: list[int | None] = _slot(ready, owners, stored, max_stored)
        if all(chunk is None for chunk in slot):
            slot = _slot(ready, owners, stored, len(owners))
        for node, sent in enumerate(slot):
            sends[node].append(sent)
            if sent is None:
                continue
            left -= 1
            after = (node + 1) % num_nodes
            if owners[sent] != node:
                stored[node] -= 1
            if owners[sent] != (after + 1) % num_nodes:
                heapq.heappush(ready[after], sent)
                stored[after] += 1
        most = [max(pair) for pair in zip(most, stored, strict=True)]
    return [
        NodeSchedule(tuple(sends[node]), tuple(sends[node - 1] if num_nodes > 1 else ()), most[node])
        for node in range(num_nodes)
    ]


def _slot(ready: list[list[int]], owners: Sequence[int], stored: list[int], max_stored: int) -> list[int | None]:
    """Take for every node the most urgent chunk that its successor may receive."""
    num_nodes = len(ready)
    chosen: list[int | None] = []
    for node, heap in enumerate(ready):
        after = (node + 1) % num_nodes
        passed_over: list[int] = []
        found: int | None = None
        while heap:
            chunk = heapq.heappop(heap)
            waits_there = owners[chunk] != (after + 1) % num_nodes
            if not waits_there or stored[after] < max_stored:
                found = chunk
                break
            passed_over.append(chunk)
        for chunk in passed_over:
            heapq.heappush(heap, chunk)
        chosen.append(found)
    return chosen
