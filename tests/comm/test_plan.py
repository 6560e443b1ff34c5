"""Plans of buckets: every value goes to one place, evenly, and what can stay with its owner's place does."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_accel.comm.plan import TOLERANCE, make_plan
from rl_accel.comm.topology import Topology


def shape(num_nodes: int, local_size: int) -> Topology:
    nodes = tuple(tuple(range(n * local_size, (n + 1) * local_size)) for n in range(num_nodes))
    return Topology(None, nodes, 0, None, None)  # type: ignore[arg-type]


def check(slices, top: Topology, group_size: int):
    plan = make_plan(slices, top, group_size)
    plan.rows.check_integrity(group_size)
    total = sum(count for _, count in slices)
    owners = [owner for owner, count in slices for _ in range(count)]
    seen = [False] * total
    for row in plan.columns:
        for node, column in enumerate(row):
            for piece in column.pieces:
                assert piece.owner in top.nodes[node]
                for i in range(piece.start, piece.start + piece.count):
                    assert not seen[i] and owners[i] == piece.owner
                    seen[i] = True
    assert all(seen)
    covered = sum(int(span) for span in plan.rows.pieces_K4[:, 3])
    assert covered == plan.rows.num_rows * plan.rows.numel
    return plan


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_every_value_goes_to_one_place_of_its_owners_node(data):
    num_nodes, local_size = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    ranks = st.integers(0, num_nodes * local_size - 1)
    slices = data.draw(st.lists(st.tuples(ranks, st.integers(0, 700)), min_size=1, max_size=12))
    check(slices, shape(num_nodes, local_size), 32)


@pytest.mark.parametrize("num_buckets", [1, 3, 8, 13, 64])
@pytest.mark.parametrize("num_nodes,local_size", [(2, 2), (8, 1), (4, 8), (12, 1), (3, 5)])
def test_places_of_a_node_get_the_same_of_every_bucket(num_nodes, local_size, num_buckets):
    """Contiguous partitions and buckets of parameters from the last to the first, as DeepSpeed has them."""
    top = shape(num_nodes, local_size)
    partition, group = 40_960, 128
    total = partition * top.world_size
    edges = [total * i // num_buckets // 7 * 7 for i in range(num_buckets)] + [total]
    moved = 0
    for low, high in reversed([*pairwise(edges)]):
        slices = []
        for rank in range(low // partition, -(-high // partition)):
            slices.append((rank, min(high, (rank + 1) * partition) - max(low, rank * partition)))
        plan = check(slices, top, group)
        loads = plan.row_groups
        # A node that is in the bucket with all its ranks is even as it is; of two more, the rest of a group each.
        assert max(loads) <= (1 + TOLERANCE) * sum(loads) / local_size + 4
        for place, row in enumerate(plan.columns):
            for node, column in enumerate(row):
                moved += sum(piece.count for piece in column.pieces if piece.owner != top.nodes[node][place])
    if num_buckets == 1 or local_size == 1:
        assert moved == 0
    assert moved <= 2 * num_buckets * partition * local_size


def test_pieces_that_follow_each_other_are_one():
    plan = check([(0, 5), (0, 300), (1, 7), (1, 0), (1, 9)], shape(2, 1), 32)
    (first, second) = (column.pieces for column in plan.columns[0])
    assert [(piece.start, piece.count) for piece in (*first, *second)] == [(0, 305), (305, 16)]
