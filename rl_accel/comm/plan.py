"""How a bucket of gradients is cut up for a balanced reduction.

A host says which rank owns which slice of a bucket. Buckets hold parameters that follow each other, which few ranks
own, so sending slices to their owners at once would load these ranks' links alone. Here every bucket is spread over
the places in a node: what a node's ranks shall own of it is cut into even columns, one a place, whoever owns the
values. A place keeps what its own rank owns up to its even share; only the rest moves, and is passed on inside the
node after the reduction. Between nodes nothing moves: columns wait until all buckets are there and go out at once,
when every node has the same to send to every other one. Source: ours; SDP4Bit's code pads each bucket to an even split
instead, which only a host that chooses its optimizer's layout can do.

A plan is the same on all ranks. Cost: O(slices + nodes * places) once per kind of bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from rl_accel.comm.topology import Topology
from rl_accel.kernels.codec.layout import padded
from rl_accel.kernels.codec.rows import Rows

TOLERANCE = 0.05
"""A place may have this much more than its even share before values move."""


@dataclass(frozen=True)
class Piece:
    """Values of a bucket that one place of the owner's node reduces."""

    start: int
    """In the bucket."""
    count: int
    owner: int
    """Rank that gets the sum."""


@dataclass(frozen=True)
class Column:
    """What the ranks at one place reduce for one node."""

    pieces: tuple[Piece, ...]
    num_groups: int
    """Of all pieces, each padded to whole groups."""


@dataclass(frozen=True)
class BucketPlan:
    """A bucket as L rows of columns for N nodes."""

    columns: tuple[tuple[Column, ...], ...]
    """[place][node]."""
    rows: Rows
    """The bucket's values in L rows of one size."""

    @property
    def row_groups(self) -> tuple[int, ...]:
        """Groups of each place's row, without what makes rows one size."""
        return tuple(sum(column.num_groups for column in row) for row in self.columns)


def make_plan(slices: Sequence[tuple[int, int]], topology: Topology, group_size: int) -> BucketPlan:
    """Cut up a bucket.

    Args:
        slices: (owner, values) in the order of the bucket, which they cover.
        group_size: values per scale; pieces are padded to whole groups.
    """
    by_node: list[list[Piece]] = [[] for _ in topology.nodes]
    node_of = {rank: node for node, ranks in enumerate(topology.nodes) for rank in ranks}
    start = 0
    for owner, run in groupby(slices, key=lambda owned: owned[0]):
        count = sum(size for _, size in run)
        if count:
            by_node[node_of[owner]].append(Piece(start, count, owner))
        start += count
    spread = [_spread(pieces, topology.nodes[node], group_size) for node, pieces in enumerate(by_node)]
    columns = tuple(
        tuple(_column(spread[node][place], group_size) for node in range(topology.num_nodes))
        for place in range(topology.local_size)
    )
    numel = group_size * max(sum(column.num_groups for column in row) for row in columns)
    return BucketPlan(columns, Rows.of(topology.local_size, numel, _row_pieces(columns, numel, group_size)))


def _spread(pieces: list[Piece], ranks: tuple[int, ...], group_size: int) -> list[list[Piece]]:
    """Deal the pieces that a node's ranks own out to its places, evenly."""
    places: list[list[Piece]] = [[piece for piece in pieces if piece.owner == rank] for rank in ranks]
    loads = [sum(piece.count for piece in own) for own in places]
    share = padded(-(-sum(loads) // len(ranks)), group_size)
    if max(loads) <= share * (1 + TOLERANCE):
        return places
    surplus: list[Piece] = []
    for own in places:
        while (excess := sum(piece.count for piece in own) - share) > 0:
            last = own.pop()
            kept = max(0, last.count - padded(excess, group_size))
            if kept:
                own.append(Piece(last.start, kept, last.owner))
            surplus.append(Piece(last.start + kept, last.count - kept, last.owner))
    for own in places:
        remaining = share - sum(piece.count for piece in own)
        while surplus and remaining >= group_size:
            piece = surplus.pop()
            taken = min(piece.count, remaining // group_size * group_size)
            own.append(Piece(piece.start, taken, piece.owner))
            remaining -= taken
            if taken < piece.count:
                surplus.append(Piece(piece.start + taken, piece.count - taken, piece.owner))
    places[0] += surplus  # less than a group a place, which no place had left
    return places


def _column(pieces: list[Piece], group_size: int) -> Column:
    ordered = tuple(sorted(pieces, key=lambda piece: piece.start))
    return Column(ordered, sum(padded(piece.count, group_size) for piece in ordered) // group_size)


def _row_pieces(columns: tuple[tuple[Column, ...], ...], numel: int, group_size: int):
    """Yield (start, count, target, span) of all rows; every group of them is in one."""
    for place, row in enumerate(columns):
        target = place * numel
        for column in row:
            for piece in column.pieces:
                span = padded(piece.count, group_size)
                yield piece.start, piece.count, target, span
                target += span
        if target < (place + 1) * numel:
            yield 0, 0, target, (place + 1) * numel - target
