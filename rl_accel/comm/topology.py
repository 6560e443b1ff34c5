"""Which ranks share a node, and the process groups of the two levels.

Ranks are those of the data-parallel group. Level one joins the L ranks of a node, level two the N ranks that have the
same place in their nodes. Where nodes differ in size there is one level: every rank counts as a node of its own.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from rl_accel.errors import CommError

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Drawn when a machine starts; containers of one machine share it, and have host names of their own."""


@dataclass(frozen=True)
class Topology:
    """A data-parallel group as N nodes of L ranks."""

    group: dist.ProcessGroup
    nodes: tuple[tuple[int, ...], ...]
    """Ranks of `group` by node, [N][L]."""
    rank: int
    local_group: dist.ProcessGroup | None
    """The ranks of this node; None where L is 1."""
    cross_group: dist.ProcessGroup | None
    """The ranks at this place of every node; None where N is 1."""

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.local_size

    @property
    def num_nodes(self) -> int:
        return len(self.nodes)

    @property
    def local_size(self) -> int:
        return len(self.nodes[0])

    def is_of(self, group: dist.ProcessGroup) -> bool:
        """Whether `group` joins the same ranks in the same order, so that our collectives can stand for its own."""
        same = group is self.group
        return same or dist.get_process_group_ranks(group) == dist.get_process_group_ranks(self.group)

    @property
    def node(self) -> int:
        """Index of this rank's node."""
        return next(i for i, ranks in enumerate(self.nodes) if self.rank in ranks)

    @property
    def local_rank(self) -> int:
        """Place of this rank in its node."""
        return self.nodes[self.node].index(self.rank)


def node_names(group: dist.ProcessGroup, local_size: int | None) -> list[str]:
    """Name of every rank's node: blocks of `local_size` ranks if given, else what the launcher says (torchrun's
    GROUP_RANK), else the host. Collective over `group`."""
    if local_size is not None:
        return [str(rank // local_size) for rank in range(dist.get_world_size(group))]
    own = f"{host_name()}/{os.environ.get('GROUP_RANK', '')}"
    names: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(names, own, group=group)
    return names


def host_name() -> str:
    """Name of this host, unlike those of machines that were made of one image and are all called the same."""
    try:
        boot = BOOT_ID.read_text().strip()
    except OSError:  # not Linux, or hidden by a container
        boot = ""
    return f"{socket.gethostname()}/{boot}"


def arrange(names: list[str]) -> tuple[tuple[int, ...], ...]:
    """Ranks by node; one rank a node where nodes differ in size, or where a place in them is not taken in the order of
    nodes (process groups number their members in rising order)."""
    by_name: dict[str, list[int]] = {}
    for rank, name in enumerate(names):
        by_name.setdefault(name, []).append(rank)
    nodes = list(by_name.values())
    one_size = len({len(ranks) for ranks in nodes}) == 1
    if not one_size or any(list(column) != sorted(column) for column in zip(*nodes, strict=True)):
        return tuple((rank,) for rank in range(len(names)))
    return tuple(tuple(ranks) for ranks in nodes)


def build(group: dist.ProcessGroup, local_size: int | None = None, purpose: str = "") -> Topology:
    """Find the nodes and make the process groups of both levels. Collective over `group`.

    Args:
        purpose: what the groups are for; collectives of different purposes may run at the same time.

    Raises:
        CommError: if `local_size` does not divide the group.
    """
    world_size, rank = dist.get_world_size(group), dist.get_rank(group)
    if local_size is not None and world_size % local_size:
        raise CommError(f"comm.local_size={local_size} does not divide the {world_size} data-parallel ranks")
    nodes = arrange(node_names(group, local_size))
    node = next(i for i, ranks in enumerate(nodes) if rank in ranks)
    place = nodes[node].index(rank)
    local = _subgroup(group, nodes[node], purpose) if len(nodes[0]) > 1 else None
    cross = _subgroup(group, tuple(ranks[place] for ranks in nodes), purpose) if len(nodes) > 1 else None
    return Topology(group, nodes, rank, local, cross)


_subgroups: dict[tuple[dist.ProcessGroup, tuple[int, ...], str], dist.ProcessGroup] = {}
"""Groups made so far. A group costs threads and connections, and PyTorch cannot make one a second time after it was
destroyed: the new one finds the addresses of the old one in the store."""


def _subgroup(group: dist.ProcessGroup, ranks: tuple[int, ...], purpose: str) -> dist.ProcessGroup:
    """Only the members call, so groups of one data-parallel group need nothing of the rest of the world."""
    if len(ranks) == dist.get_world_size(group) and not purpose:
        return group
    key = (group, ranks, purpose)
    if key not in _subgroups:
        members = [dist.get_global_rank(group, rank) for rank in ranks]
        about = f"rl_accel {purpose}" if purpose else None
        _subgroups[key] = dist.new_group(members, use_local_synchronization=True, group_desc=about)
    return _subgroups[key]
