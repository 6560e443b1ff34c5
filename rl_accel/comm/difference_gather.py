"""Weight differences of contiguously sharded weights (ZeRO 1 and 2), brought to all ranks while the host waits.

A rank encodes what its shard became less what the others hold (SDP4Bit §3.1) in one call of the codec; codes cross
between the ranks of one place in an all-gather, are shared inside the node in a second one, and one call of the codec
adds them to the held weights. All ranks, the owner too, add the same decoded codes, so replicas stay equal bit for bit,
and equal to those of the ring (difference.py), which does the same while the host goes on. Shards are of one size, so
all links carry the same.

Bytes that a rank sends, of P weights on N nodes of L ranks: between nodes (N-1) P/(LN) (1/2 + 4/G), inside
(L-1) P/L (1/2 + 4/G).
Memory: the codes of a shard; `max_buffer_mib` for the chunk that is on its way.
Source: SDP4Bit §3.1; two levels and chunks are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from rl_accel.comm import wire
from rl_accel.comm.config import SDP4BitConfig
from rl_accel.comm.difference import all_gather_single
from rl_accel.comm.topology import Topology
from rl_accel.comm.traffic import Traffic
from rl_accel.kernels.codec.layout import padded
from rl_accel.kernels.codec.rows import Rows


class DifferenceGather:
    """Renews flat replicas of which each rank owns a contiguous shard. All ranks make the same calls in the same order.

    Args:
        numels: values of a shard, flat tensor by flat tensor.
    """

    def __init__(self, topology: Topology, config: SDP4BitConfig, traffic: Traffic, numels: Sequence[int]):
        self.topology, self.traffic = topology, traffic
        self.format = wire.Format(config.weight_bits, config.weight_group_size, config.backend)
        self.difference = config.weight_difference and self.format.quantized
        self._numels = list(numels)
        self._max_bytes = (config.max_buffer_mib << 20) // ((topology.local_size + 1) * topology.num_nodes + 1)
        self._rows: dict[tuple[int, int], Rows] = {}

    def encode(self, new: Sequence[torch.Tensor], old: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Encode the own shards and add the result to `old`, in place: to what every rank will hold.

        Args:
            new, old: float32, bfloat16 or float16 [numel], flat tensor by flat tensor: what the shards should become,
                and what the other ranks hold.

        Returns:
            uint8 [num_chunks, bytes of a chunk], flat tensor by flat tensor.
        """
        found = []
        for numel, target, held in zip(self._numels, new, old, strict=True):
            self.traffic.weight_values += numel * self.topology.world_size
            rows = self._own_rows(numel)
            block = self.format.encode_rows(
                target, rows, "nearest", 0, 0, rotate=False, subtract=held if self.difference else None
            )
            self.format.decode_rows(block, rows, held, add=self.difference)
            found.append(block)
        return found

    def run(self, blocks: Sequence[torch.Tensor], flats: Sequence[torch.Tensor]) -> Iterator[int]:
        """Bring every chunk to this rank; yields how many are added to the held weights.

        Args:
            blocks: of `encode`.
            flats: [W * numel]: the held weights, with the own shards up to date.
        """
        top, done = self.topology, 0
        for numel, block, flat in zip(self._numels, blocks, flats, strict=True):
            for number, chunk in enumerate(block):
                codes = _gathered(_gathered(chunk.view(1, -1), top.cross_group), top.local_group)
                self.traffic.weight_inter += chunk.numel() * (top.num_nodes - 1)
                self.traffic.weight_intra += chunk.numel() * top.num_nodes * (top.local_size - 1)
                self.format.decode_rows(codes, self._rows_of_all(numel, number), flat, add=self.difference)
                done += 1
                yield done

    def _part(self, numel: int) -> tuple[int, int]:
        """Chunks of a shard, and values of one: whole groups."""
        num_chunks = max(1, -(-self.format.num_bytes(numel) // self._max_bytes)) if numel else 0
        return num_chunks, padded(-(-numel // max(1, num_chunks)), self.format.group_size)

    def _own_rows(self, numel: int) -> Rows:
        if (numel, -1) not in self._rows:
            num_chunks, part = self._part(numel)
            pieces = [(i * part, min(part, numel - i * part), i * part, part) for i in range(num_chunks)]
            self._rows[numel, -1] = Rows.of(num_chunks, part, [piece for piece in pieces if piece[1] > 0])
        return self._rows[numel, -1]

    def _rows_of_all(self, numel: int, number: int) -> Rows:
        """Rows (place, node) of a chunk of all ranks' shards in the flat tensor; the own one was added before."""
        if (numel, number) not in self._rows:
            top = self.topology
            _, part = self._part(numel)
            start, count = number * part, min(part, numel - number * part)
            ranks = [rank for place in zip(*top.nodes, strict=True) for rank in place]
            pieces = [
                (rank * numel + start, count, row * part, part)
                for row, rank in enumerate(ranks)
                if rank != top.rank and count > 0
            ]
            self._rows[numel, number] = Rows.of(top.world_size, part, pieces)
        return self._rows[numel, number]


def _gathered(rows: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Gather uint8 [R, bytes] of the ranks of a group; returns [ranks * R, bytes]."""
    if group is None:
        return rows
    received = rows.new_empty(dist.get_world_size(group) * rows.shape[0], rows.shape[1])
    all_gather_single(received.view(-1), rows.view(-1), group=group)
    return received
