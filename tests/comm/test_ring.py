"""Schedules of the ring: everything arrives, once, over links that are all loaded alike, the most urgent first."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_accel.comm.ring import make_schedule


def replay(owners, num_nodes: int, max_stored: int):
    """Run a schedule; returns, node by node, when each chunk was there (slots)."""
    schedule = make_schedule(owners, num_nodes, max_stored)
    has = [{chunk: 0 for chunk, owner in enumerate(owners) if owner == node} for node in range(num_nodes)]
    num_slots = {len(node.send) for node in schedule} | {len(node.receive) for node in schedule}
    assert len(num_slots) == 1
    for slot in range(num_slots.pop()):
        for node in range(num_nodes):
            chunk = schedule[node].send[slot]
            after = (node + 1) % num_nodes
            assert schedule[after].receive[slot] == chunk
            if chunk is not None:
                assert has[node].get(chunk, slot + 1) <= slot, "passed on before it was there"
                assert chunk not in has[after], "came twice"
        for node in range(num_nodes):
            chunk = schedule[node].receive[slot]
            if chunk is not None:
                has[node][chunk] = slot + 1
    assert all(len(arrived) == len(owners) for arrived in has)
    return schedule, has


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_everything_arrives_once(data):
    num_nodes = data.draw(st.integers(1, 7))
    owners = data.draw(st.lists(st.integers(0, num_nodes - 1), max_size=40))
    replay(owners, num_nodes, data.draw(st.integers(1, 10)))


@pytest.mark.parametrize("num_nodes", [2, 3, 8, 12])
def test_links_are_full_and_urgent_chunks_come_first(num_nodes):
    """Contiguous shards in the order of layers: the time of a ring all-gather, and the first layers at once."""
    per_node = 16
    owners = [node for node in range(num_nodes) for _ in range(per_node)]
    schedule, has = replay(owners, num_nodes, len(owners))
    shortest = per_node * (num_nodes - 1)
    assert len(schedule[0].send) <= shortest + num_nodes
    for node in schedule:
        assert sum(chunk is not None for chunk in node.send) == shortest
    for node, arrived in enumerate(has):
        for chunk in range(per_node):  # node 0's: one after the other, as far as the node is away
            assert arrived[chunk] == (chunk + node if node else 0)


def test_waiting_chunks_keep_to_the_limit():
    owners = [node for node in range(6) for _ in range(20)]
    free, _ = replay(owners, 6, len(owners))
    tight, _ = replay(owners, 6, 3)
    assert max(node.max_stored for node in free) > 3
    assert max(node.max_stored for node in tight) <= 4
    assert len(tight[0].send) <= 1.5 * len(free[0].send)
