"""Secondary shards: what the ranks at one place of all nodes own of evenly sharded weights, kept on each of them.

With it a gather of weights stays inside the node. Once an optimizer step is done, each rank sends the other nodes 4
bits of what its own shard became less what they hold (SDP4Bit §3.1), and forward and backward passes gather from the
secondary shards of the node's ranks, in full precision. ZeRO++'s hpZ keeps such a shard for the backward pass alone
and fills it in full precision each step.

Bytes that a rank sends, of P weights on N nodes of L ranks: between nodes (N-1) P/(LN) (1/2 + 4/G) a step, inside
2 (L-1) P/L a gather in bfloat16.
Memory: P/L weights in the dtype of the gather, 2 bytes each in bfloat16; during a gather the weights of its units twice
more.
Source: SDP4Bit §3.1 and ZeRO++ §4.2; the combination is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rl_accel.comm import wire
from rl_accel.comm.config import SDP4BitConfig
from rl_accel.comm.difference import all_gather_single
from rl_accel.comm.topology import Topology
from rl_accel.comm.traffic import Traffic
from rl_accel.kernels.codec.layout import padded
from rl_accel.kernels.codec.rows import Rows


@dataclass(eq=False)
class Unit:
    """Weights that are gathered together, sharded evenly: each rank owns n of them."""

    changes: bool = True
    """False: no optimizer changes them."""
    held: torch.Tensor | None = None
    """The secondary shard, [N, n]: the shards of the ranks at this rank's place, node by node; equal on all of them."""
    count: int = -1
    """Of optimizer steps, when the secondary shard was up to date."""
    saved: tuple[torch.Tensor, bool] | None = None
    """Of a checkpoint that was loaded, until the next gather: what the other nodes held of the own shard, and whether
    they held the last step's."""


class SecondaryShards:
    """The exchange of secondary shards. Every call takes several units and joins them in one collective; all ranks name
    the same ones in the same order."""

    def __init__(self, topology: Topology, config: SDP4BitConfig, traffic: Traffic):
        self.topology, self.config, self.traffic = topology, config, traffic
        self._format = wire.Format(config.weight_bits, config.weight_group_size, config.backend)
        self._rows: dict[tuple[int, ...], tuple[Rows, Rows]] = {}
        by_place = [rank for place in zip(*topology.nodes, strict=True) for rank in place]
        self._order = torch.tensor(by_place).argsort()
        """[W]: where rank r is in what a gather inside the node receives, which comes place by place."""

    def fill(self, units: Sequence[Unit], shards: Sequence[torch.Tensor]) -> None:
        """Take up the shards, [n] each, of the ranks at this place of all nodes in full precision. Collective over
        them."""
        own = _joined([shard.view(1, -1) for shard in shards])
        column = own.new_empty(self.topology.num_nodes, own.numel())
        self._gather(column, own, self.topology.cross_group)
        self._put(units, [shard.numel() for shard in shards], column)

    def renew(self, units: Sequence[Unit], shards: Sequence[torch.Tensor]) -> None:
        """Bring what the shards, [n] each, became to the ranks at this place of all nodes. Collective over them."""
        top = self.topology
        numels = [shard.numel() for shard in shards]
        if not sum(numels):
            return
        difference = self.config.weight_difference and self._format.quantized
        own, all_nodes = self._rows_of(tuple(numels))
        column = _joined([unit.held for unit in units if unit.held is not None])
        subtract = column[top.node] if difference else None
        new = _joined([shard.view(1, -1) for shard in shards]).view(-1)
        block = self._format.encode_rows(new, own, "nearest", 0, 0, rotate=False, subtract=subtract)[0]
        received = torch.empty(top.num_nodes, block.numel(), dtype=torch.uint8, device=new.device)
        self._gather(received, block, top.cross_group)
        self.traffic.weight_inter += block.numel() * (top.num_nodes - 1)
        self.traffic.weight_values += column.numel()
        self._format.decode_rows(received, all_nodes, column.view(-1), add=difference)
        if len(units) > 1:
            self._put(units, numels, column)

    def gather(self, units: Sequence[Unit], wholes: Sequence[torch.Tensor]) -> None:
        """Write all weights of each unit, [W, n], from the secondary shards of the node's ranks. Collective over the
        node."""
        top = self.topology
        column = _joined([unit.held for unit in units if unit.held is not None])
        by_place = column.new_empty(top.local_size, *column.shape)
        self._gather(by_place, column, top.local_group)
        if top.local_group is not None:
            self.traffic.weight_intra += column.numel() * column.element_size() * (top.local_size - 1)
        self._order = self._order.to(column.device)
        by_place, first = by_place.view(top.world_size, -1), 0
        for whole in wholes:
            numel = whole.shape[1]
            torch.index_select(by_place[:, first : first + numel], 0, self._order, out=whole)
            first += numel

    def _rows_of(self, numels: tuple[int, ...]) -> tuple[Rows, Rows]:
        """Return the rows of the own block and of all nodes' blocks; every unit begins a group."""
        if numels not in self._rows:
            spans = [padded(numel, self._format.group_size) for numel in numels]
            width, span = sum(numels), sum(spans)
            pieces = []
            for node in range(self.topology.num_nodes):
                start, target = node * width, node * span
                for numel, whole in zip(numels, spans, strict=True):
                    pieces.append((start, numel, target, whole))
                    start, target = start + numel, target + whole
            pieces = [piece for piece in pieces if piece[1]]
            own = [piece for piece in pieces if piece[2] < span]
            self._rows[numels] = Rows.of(1, span, own), Rows.of(self.topology.num_nodes, span, pieces)
        return self._rows[numels]

    @staticmethod
    def _put(units: Sequence[Unit], numels: Sequence[int], column: torch.Tensor) -> None:
        for unit, part in zip(units, column.split([*numels], dim=1), strict=True):
            unit.held = part.clone() if unit.held is None else unit.held.copy_(part)

    @staticmethod
    def _gather(received: torch.Tensor, own: torch.Tensor, group: torch.distributed.ProcessGroup | None) -> None:
        if group is None:
            received.copy_(own.view(received.shape))
        else:
            all_gather_single(received.view(-1), own.reshape(-1), group=group)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join [N, n] tensors side by side; a single one stays where it is."""
    return parts[0].contiguous() if len(parts) == 1 else torch.cat([*parts], dim=1)
