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
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from rl_accel.comm import wire
from rl_accel.comm.config import SDP4BitConfig
from rl_accel.comm.topology import Topology
from rl_accel.kernels.codec.layout import padded
from rl_accel.kernels.common.noise import fold_key

_all_gather_single = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)  # its name until torch 2.12
_HOP_ONE, _HOP_TWO = 1, 2
_WISH = 4
"""Bytes of a rank's wish for weights in full: a whole word, so that scales stay aligned."""


@dataclass
class Traffic:
    """Bytes that this rank sent to others, and what for."""

    gradient_intra: int = 0
    gradient_inter: int = 0
    weight_intra: int = 0
    weight_inter: int = 0
    gradient_values: int = 0
    """Gradient values that went through `reduce_scatter`."""
    weight_values: int = 0
    """Weights that `gather_difference` renewed."""


@dataclass
class QuantizedCollectives:
    """The collectives of one data-parallel group. All ranks make the same calls in the same order."""

    topology: Topology
    config: SDP4BitConfig
    calls: int = 0
    """`reduce_scatter` calls so far: part of the key of the rounding noise, kept in checkpoints."""
    traffic: Traffic = field(default_factory=Traffic)

    def reduce_scatter(self, blocks: Sequence[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        """Sum the ranks' blocks; each rank keeps the sum of the block with its own number.

        Args:
            blocks: one contiguous float32 or bfloat16 tensor per rank; block d has the same size on all ranks.
            out: float32 or bfloat16, as large as the block of this rank; written.

        Returns:
            `out`.
        """
        top, config = self.topology, self.config
        self.calls += 1
        self.traffic.gradient_values += sum(block.numel() for block in blocks)
        first = wire.Format(config.intra_bits, config.gradient_group_size, config.backend)
        second = wire.Format(config.inter_bits, config.gradient_group_size, config.backend)
        if top.world_size == 1:
            return out.copy_(blocks[0].view_as(out))
        if top.local_group is None:
            return self._scatter_one_hop(blocks, out, second, _HOP_TWO)
        if top.cross_group is None:
            return self._scatter_one_hop(blocks, out, first, _HOP_ONE)
        return self._scatter_two_hops(blocks, out, first, second)

    def _scatter_one_hop(self, blocks, out, format: wire.Format, hop: int) -> torch.Tensor:
        top = self.topology
        group = top.cross_group if hop == _HOP_TWO else top.local_group
        # With one level, group ranks and places in it are the same order as `nodes`.
        order = [ranks[0] for ranks in top.nodes] if hop == _HOP_TWO else list(top.nodes[0])
        sizes = [format.num_bytes(blocks[rank].numel()) for rank in order]
        send = self._encode([blocks[rank] for rank in order], sizes, format, hop, rotate=self.config.hadamard)
        received = self._exchange(send, sizes, format.num_bytes(out.numel()), group, hop)
        return format.decode_sum(received, out, rotated=self.config.hadamard)

    def _scatter_two_hops(self, blocks, out, first: wire.Format, second: wire.Format) -> torch.Tensor:
        top, rotate = self.topology, self.config.hadamard
        node, place = top.node, top.local_rank
        # To each rank of the node goes what its counterparts on all nodes, itself included, shall own.
        columns = [[blocks[ranks[peer]] for ranks in top.nodes] for peer in range(top.local_size)]
        sizes = [[first.num_bytes(block.numel()) for block in column] for column in columns]
        send = self._encode(
            [block for column in columns for block in column],
            [size for column in sizes for size in column],
            first,
            _HOP_ONE,
            rotate,
        )
        received = self._exchange(send, [sum(column) for column in sizes], sum(sizes[place]), top.local_group, _HOP_ONE)
        parts = received.split(sizes[place], dim=1)

        numels = [block.numel() for block in columns[place]]
        second_sizes = [second.num_bytes(numel) for numel in numels]
        middle = torch.empty(sum(second_sizes), dtype=torch.uint8, device=out.device)
        key = self._key(_HOP_TWO)
        offset = 0
        for part, numel, piece in zip(parts, numels, middle.split(second_sizes), strict=True):
            if numel:
                rounding = self.config.gradient_rounding
                second.recode(part.contiguous(), numel, first, piece, rounding, key, offset, rotate=rotate)
            offset += padded(numel, self.config.gradient_group_size)
        received = self._exchange(middle, second_sizes, second_sizes[node], top.cross_group, _HOP_TWO)
        return second.decode_sum(received, out, rotated=rotate)

    def _encode(self, blocks, sizes, format: wire.Format, hop: int, rotate: bool) -> torch.Tensor:
        send = torch.empty(sum(sizes), dtype=torch.uint8, device=blocks[0].device)
        key, offset = self._key(hop), 0
        for block, piece in zip(blocks, send.split(sizes), strict=True):
            if block.numel():
                format.encode(block, piece, self.config.gradient_rounding, key, offset, rotate=rotate)
            offset += padded(block.numel(), self.config.gradient_group_size)
        return send

    def _key(self, hop: int) -> int:
        return fold_key(self.config.seed, self.calls, hop, self.topology.rank)

    def _exchange(self, send, sizes: list[int], own: int, group, hop: int) -> torch.Tensor:
        """All-to-all of one piece per peer; returns [peers, bytes of the own piece]."""
        peers = len(sizes)
        received = torch.empty(peers, own, dtype=torch.uint8, device=send.device)
        dist.all_to_all_single(received.view(-1), send, [own] * peers, sizes, group=group)
        sent = send.numel() - sizes[dist.get_rank(group)]
        if hop == _HOP_ONE:
            self.traffic.gradient_intra += sent
        else:
            self.traffic.gradient_inter += sent
        return received

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
        if own.numel():
            piece = block[: format.num_bytes(own.numel())]
            format.encode(own, piece, self.config.gradient_rounding, self._key(3), 0, rotate=rotate)
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
