"""Quantized collectives of gradients on plain `torch.distributed`, gloo or NCCL: those of one call. Buckets that wait
for each other are in reduction.py, weights in difference.py and secondary.py.

Every rank decodes the same bytes with the same backend, so what they share stays equal bit for bit.

Bytes sent by one rank for P gradients, L ranks on each of N nodes, G values a group:
    reduce_scatter  inside (L-1)/L P (1 + 4/G), between (N-1)/N P/L (1/2 + 4/G)
    gather_sum      between (N-1) P/(LN) (1 + 4/G), inside (L-1)/L P (1 + 4/G)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rl_accel.comm import wire
from rl_accel.comm.config import SDP4BitConfig
from rl_accel.comm.difference import all_gather_single
from rl_accel.comm.reduction import Reduction
from rl_accel.comm.topology import Topology
from rl_accel.comm.traffic import Traffic
from rl_accel.kernels.common.noise import fold_key

_GATHER = 3
"""Key of the noise of `gather_sum`, beside those of the reduction's hops."""


class QuantizedCollectives:
    """The collectives of one data-parallel group. All ranks make the same calls in the same order.

    Attributes:
        reduction: sums of gradients whose buckets wait for each other.
        traffic: bytes sent so far.
    """

    def __init__(self, topology: Topology, config: SDP4BitConfig):
        self.topology, self.config = topology, config
        self.traffic = Traffic()
        self.reduction = Reduction(topology, config, self.traffic)

    def reduce_scatter(self, values: torch.Tensor, sizes: Sequence[int], out: torch.Tensor) -> torch.Tensor:
        """Sum the ranks' values at once; each rank keeps the block with its own number.

        Args:
            values: float32, bfloat16 or float16, contiguous: one block per rank.
            sizes: values of each block, the same on all ranks; may be 0.
            out: float32, bfloat16 or float16, as large as the block of this rank; written.

        Returns:
            `out`.
        """
        rank = self.topology.rank
        own = sum(sizes[:rank])
        if self.topology.world_size == 1:
            self.traffic.gradient_values += values.numel()
            return out.copy_(values.view_as(out))

        def deliver(start: int, part: torch.Tensor) -> None:
            out[start - own : start - own + part.numel()].copy_(part)

        self.reduction.add(values, list(enumerate(sizes)), deliver)
        self.reduction.flush()
        return out

    def gather_sum(self, own: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
        """All-gather reduced gradients for hosts that want the sum on every rank: 8 bits with the Hadamard rotation, or
        bfloat16 where the slowest hop of the reduction is set to 16 bits.

        Args:
            own: float32 or bfloat16, `sizes[rank]` values.
            sizes: values per rank.

        Returns:
            one tensor per rank, dtype of `own`, equal on all ranks.
        """
        slowest = self.config.inter_bits if self.topology.cross_group is not None else self.config.intra_bits
        format = wire.Format(max(8, slowest), self.config.gradient_group_size, self.config.backend)
        rotate = self.config.hadamard
        block = torch.zeros(format.num_bytes(max(sizes)), dtype=torch.uint8, device=own.device)
        key = fold_key(self.config.seed, self.reduction.calls, _GATHER, self.topology.rank)
        if own.numel():
            piece = block[: format.num_bytes(own.numel())]
            format.encode(own, piece, self.config.gradient_rounding, key, 0, rotate=rotate)
        parts = [torch.empty(size, dtype=own.dtype, device=own.device) for size in sizes]
        for rank, piece in self._gather(block):
            if sizes[rank]:
                piece = piece[: format.num_bytes(sizes[rank])]
                format.decode_sum(piece.unsqueeze(0), parts[rank], rotated=rotate)
        return parts

    def _gather(self, block: torch.Tensor):
        """All-gather one block of gradients per rank, between nodes first; yields (rank, block)."""
        top = self.topology
        column = block.unsqueeze(0)
        if top.cross_group is not None:
            column = torch.empty(top.num_nodes, block.numel(), dtype=torch.uint8, device=block.device)
            all_gather_single(column.view(-1), block, group=top.cross_group)
            self.traffic.gradient_inter += block.numel() * (top.num_nodes - 1)
        grid = column.unsqueeze(0)
        if top.local_group is not None:
            grid = torch.empty(top.local_size, *column.shape, dtype=torch.uint8, device=block.device)
            all_gather_single(grid.view(-1), column.view(-1), group=top.local_group)
            self.traffic.gradient_intra += column.numel() * (top.local_size - 1)
        for place in range(top.local_size):
            for node, ranks in enumerate(top.nodes):
                yield ranks[place], grid[place, node]
