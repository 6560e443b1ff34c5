"""Quantized collectives of sharded data parallelism on plain `torch.distributed`, gloo or NCCL.

- `reduce_scatter`: two hops, 8 bits inside a node and 4 between nodes, without leaving the Hadamard domain in between
  (SDP4Bit §3.2). Blocks may differ in size and be empty.
- `gather_difference`: what changed in each rank's shard of the weights, 4 bits, first between nodes, then inside
  (SDP4Bit §3.1; the hierarchy is ours: L (N-1) shards leave each node, where a flat ring sends L N - 1).
Every rank decodes the same bytes with the same backend, so replicas stay equal bit for bit.
Not covered: overlap with computation; chunks of one call do not overlap each other either.

Bytes sent by one rank for P parameters, L ranks on each of N nodes, G values a group:
    reduce_scatter  inside (L-1)/L P (1 + 4/G), between (N-1)/N P/L (1/2 + 4/G)
    gather          between (N-1) P/(LN) (1/2 + 4/G), inside (L-1)/L P (1/2 + 4/G)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from rl_accel.comm import wire
from rl_accel.comm.config import SDP4BitConfig
from rl_accel.comm.reduction import Reduction
from rl_accel.comm.topology import Topology
from rl_accel.comm.traffic import Traffic
from rl_accel.kernels.common.noise import fold_key

_all_gather_single = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)  # its name until torch 2.12
_GATHER = 3
"""Key of the noise of `gather_sum`, beside those of the reduction's hops."""
_WISH = 4
"""Bytes of a rank's wish for weights in full: a whole word, so that scales stay aligned."""


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

    def gather_difference(
        self, held: torch.Tensor, new_shard: torch.Tensor, old_shard: torch.Tensor, resync: bool | None = None
    ) -> bool:
        """Bring the replica `held` up to date on all ranks.

        Args:
            held: float32 or bfloat16 [W * n], contiguous: what all ranks hold, shard by shard. The own shard in it may
                be anything; it is restored from `old_shard` first. Updated in place, equal on all ranks afterwards.
            new_shard: [n], what the own shard should become; same dtype as `held`.
            old_shard: [n], the own shard as the other ranks still hold it.
            resync: whether this rank wants the shards in full, because a difference would be too large to send in few
                bits; one rank's wish, 4 bytes in what each sends, is granted on all. None on all ranks: nobody asks,
                and no rank waits for its device to read the wishes.

        Returns:
            whether the shards went out in full.
        """
        top, config = self.topology, self.config
        shards = held.view(top.world_size, -1)
        self.traffic.weight_values += held.numel()
        if top.world_size == 1:
            shards[0].copy_(new_shard)
            return True
        if not new_shard.numel():
            return False
        format = wire.Format(config.weight_bits, config.weight_group_size, config.backend)
        num_bytes = format.num_bytes(new_shard.numel())
        block = torch.empty(num_bytes + (0 if resync is None else _WISH), dtype=torch.uint8, device=held.device)
        block[num_bytes:].fill_(int(resync or False))
        difference = config.weight_difference and format.quantized
        subtract = old_shard if difference else None
        format.encode(new_shard, block[:num_bytes], "nearest", 0, 0, rotate=False, subtract=subtract)
        shards[top.rank].copy_(old_shard)
        pieces = list(self._gather(block))
        if resync is not None and torch.stack([piece[-1] for _, piece in pieces]).any().item():
            _all_gather_single(held, new_shard, group=top.group)
            return True
        for rank, piece in pieces:
            format.decode_sum(piece[:num_bytes].unsqueeze(0), shards[rank], rotated=False, add=difference)
        return False

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
        for rank, piece in self._gather(block, of_gradients=True):
            if sizes[rank]:
                piece = piece[: format.num_bytes(sizes[rank])]
                format.decode_sum(piece.unsqueeze(0), parts[rank], rotated=rotate)
        return parts

    def _gather(self, block: torch.Tensor, of_gradients: bool = False):
        """All-gather one block per rank, between nodes first; yields (rank, block)."""
        top = self.topology
        column = block.unsqueeze(0)
        inter = intra = 0
        if top.cross_group is not None:
            column = torch.empty(top.num_nodes, block.numel(), dtype=torch.uint8, device=block.device)
            _all_gather_single(column.view(-1), block, group=top.cross_group)
            inter = block.numel() * (top.num_nodes - 1)
        grid = column.unsqueeze(0)
        if top.local_group is not None:
            grid = torch.empty(top.local_size, *column.shape, dtype=torch.uint8, device=block.device)
            _all_gather_single(grid.view(-1), column.view(-1), group=top.local_group)
            intra = column.numel() * (top.local_size - 1)
        if of_gradients:
            self.traffic.gradient_inter += inter
            self.traffic.gradient_intra += intra
        else:
            self.traffic.weight_inter += inter
            self.traffic.weight_intra += intra
        for place in range(top.local_size):
            for node, ranks in enumerate(top.nodes):
                yield ranks[place], grid[place, node]
