"""Which ranks form nodes."""

from __future__ import annotations

import pytest

from rl_accel.comm import topology
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


def test_machines_of_one_name_are_told_apart(monkeypatch, tmp_path):
    """Machines cloned from an image are all called `localhost`: their ranks would count as one node, without 4 bits."""
    found = []
    for machine in ("a", "b"):
        (tmp_path / machine).write_text(f"{machine}\n")
        monkeypatch.setattr(topology, "BOOT_ID", tmp_path / machine)
        found.append(topology.host_name())
    monkeypatch.setattr(topology, "BOOT_ID", tmp_path / "none")
    assert found[0] != found[1] and topology.host_name().startswith(found[0].split("/")[0])
