"""Which ranks form nodes."""

from __future__ import annotations

import pytest

from rl_accel.comm.topology import arrange


@pytest.mark.parametrize(
    "names,nodes",
    [
        ("aabb", ((0, 1), (2, 3))),
        ("abab", ((0, 2), (1, 3))),
        ("a", ((0,),)),
        ("aaaa", ((0, 1, 2, 3),)),
        ("abcd", ((0,), (1,), (2,), (3,))),
        ("aab", ((0,), (1,), (2,))),  # nodes differ in size: one level
        ("abba", ((0,), (1,), (2,), (3,))),  # the second places, 3 and 2, are out of order: one level
    ],
)
def test_arrange(names, nodes):
    assert arrange(list(names)) == nodes
