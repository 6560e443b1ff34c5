"""A secondary shard: what the ranks at one place of all nodes own of evenly sharded weights, kept on each of them.

With it a gather of weights stays inside the node. Once an optimizer step is done, each rank sends the other nodes 4
bits of what its own shard became less what they hold (SDP4Bit §3.1), and forward and backward passes gather from the
secondary shards of the node's ranks, in full precision. ZeRO++'s hpZ keeps such a shard for the backward pass alone
and fills it in full precision each step.

Bytes that a rank sends, of P weights on N nodes of L ranks: between nodes (N-1) P/(LN) (1/2 + 4/G) a step, inside
2 (L-1) P/L a gather in bfloat16.
Memory: P/L weights in the dtype of the gather, 2 bytes each in bfloat16; during a gather the weights of a unit once
more.
Source: SDP4Bit §3.1 and ZeRO++ §4.2; the combination is ours.
"""

from __future__ import annotations

import torch

from rl_accel.comm import wire
from rl_accel.comm.config import SDP4BitConfig
from rl_accel.comm.difference import all_gather_single
from rl_accel.comm.topology import Topology
from rl_accel.comm.traffic import Traffic
from rl_accel.kernels.codec.layout import padded
from rl_accel.kernels.codec.rows import Rows


class SecondaryShard:
    """The secondary shard of one unit of weights, sharded evenly: rank r owns values [r n, (r + 1) n)."""

    def __init__(self, topology: Topology, config: SDP4BitConfig, traffic: Traffic):
        self.topology, self.config, self.traffic = topology, config, traffic
        self._format = wire.Format(config.weight_bits, config.weight_group_size, config.backend)
        self._rows: tuple[Rows, Rows] | None = None
        self.held: torch.Tensor | None = None
        """[N, n]: the shards of the ranks at this rank's place, node by node; equal on all of them."""

    def fill(self, whole: torch.Tensor) -> None:
        """Take up the weights of a full gather, [W * n]."""
        top = self.topology
        column = whole.view(top.world_size, -1)[[ranks[top.local_rank] for ranks in top.nodes]]
        self.held = column if self.held is None else self.held.copy_(column)

    @property
    def own(self) -> torch.Tensor | None:
        """What the other nodes hold of this rank's shard, [n]."""
        return None if self.held is None else self.held[self.topology.node]

    def renew(self, shard: torch.Tensor) -> None:
        """Bring what the own shard became, [n], to the ranks at this place of all nodes. Collective over them."""
        held, top = self.held, self.topology
        assert held is not None and top.cross_group is not None
        if not shard.numel():
            return
        difference = self.config.weight_difference and self._format.quantized
        if self._rows is None:
            numel, span = shard.numel(), padded(shard.numel(), self._format.group_size)
            pieces = [(node * numel, numel, node * span, span) for node in range(top.num_nodes)]
            self._rows = Rows.of(1, span, pieces[:1]), Rows.of(top.num_nodes, span, pieces)
        own, all_nodes = self._rows
        subtract = held[top.node] if difference else None
        block = self._format.encode_rows(shard, own, "nearest", 0, 0, rotate=False, subtract=subtract)[0]
        column = torch.empty(top.num_nodes, block.numel(), dtype=torch.uint8, device=shard.device)
        all_gather_single(column.view(-1), block, group=top.cross_group)
        self.traffic.weight_inter += block.numel() * (top.num_nodes - 1)
        self.traffic.weight_values += held.numel()
        self._format.decode_rows(column, all_nodes, held.view(-1), add=difference)

    def gather(self, whole: torch.Tensor) -> torch.Tensor:
        """Write all weights, [W * n], from the secondary shards of the node's ranks. Collective over the node."""
        held, top = self.held, self.topology
        assert held is not None
        if top.local_group is None:
            return whole.copy_(held.view(-1))
        by_place = torch.empty(top.local_size, *held.shape, dtype=held.dtype, device=held.device)
        all_gather_single(by_place.view(-1), held.view(-1), group=top.local_group)
        self.traffic.weight_intra += held.numel() * held.element_size() * (top.local_size - 1)
        order = torch.tensor(top.nodes, device=held.device).T.reshape(-1)  # ranks, place by place
        whole.view(top.world_size, -1)[order] = by_place.view(top.world_size, -1)
        return whole
