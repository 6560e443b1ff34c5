"""Weight differences of contiguously sharded weights (ZeRO 1 and 2), brought to all ranks chunk by chunk while the host
goes on; difference_gather.py does it while the host waits.

A rank encodes what its shard became less what the others hold (SDP4Bit §3.1), all of it in one call of the codec, and
shares it out over the places of its node, a part of every chunk for each. The places' rings (ring.py) then carry the
chunks from node to node in the order in which the next forward pass reads them; a chunk that arrives is put together
inside the node and added to the held weights while the next one travels. All ranks, the owner too, add the same decoded
codes, so replicas stay equal bit for bit.

Bytes that a rank sends, of P weights on N nodes of L ranks: between nodes (N-1) P/(LN) (1/2 + 4/G), inside
(L-1) P/L (1/2 + 4/G) (1 + 1/N).
Memory: the codes of a shard, three times; `max_buffer_mib` for chunks on the way.
Source: SDP4Bit §3.1; the ring and its order are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from rl_accel.comm import wire
from rl_accel.comm.config import SDP4BitConfig
from rl_accel.comm.ring import make_schedule
from rl_accel.comm.topology import Topology
from rl_accel.comm.traffic import Traffic
from rl_accel.kernels.codec.layout import padded
from rl_accel.kernels.codec.rows import Rows

all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name until torch 2.12

_PART_BYTES = {"cpu": 32 << 10}
_PART_BYTES_ON_DEVICE = 512 << 10
"""Bytes of a chunk that one place carries: small enough that a layer has its weights soon, and each costs a few
messages."""
_MAX_CHUNKS = 32
"""Chunks of one shard, unless `max_buffer_mib` asks for more."""
_SPARE = 8
"""Parts that `max_buffer_mib` has room for beside those of a chunk that is put together, twice."""


@dataclass(frozen=True)
class Chunk:
    """Values [start, start + count) of one rank's shard of one flat tensor."""

    flat: int
    owner: int
    number: int
    start: int
    count: int


@dataclass(frozen=True)
class _Cut:
    """How the shards of one flat tensor are cut: `num_chunks` chunks of L parts of `part` values each."""

    numel: int
    num_chunks: int
    part: int
    num_bytes: int
    """Of a part."""

    def chunk(self, number: int, local_size: int) -> tuple[int, int]:
        """First value of a chunk in its shard, and how many there are."""
        start = number * self.part * local_size
        return start, max(0, min(self.numel - start, self.part * local_size))


class DifferenceRing:
    """Renews flat replicas of which each rank owns a contiguous shard. All ranks make the same calls in the same order.

    Args:
        topology: with process groups that nobody else uses at the same time.
        numels: values of a shard, flat tensor by flat tensor.
        priority: (flat, first value in it, values) -> what chunks are sorted by; None: by their position.
    """

    def __init__(
        self,
        topology: Topology,
        config: SDP4BitConfig,
        traffic: Traffic,
        numels: Sequence[int],
        device: torch.device,
        priority=None,
    ):
        self.topology, self.config, self.traffic, self.device = topology, config, traffic, device
        self.format = wire.Format(config.weight_bits, config.weight_group_size, config.backend)
        self.difference = config.weight_difference and self.format.quantized
        self._rows: dict[Any, Rows] = {}
        self._cuts = [self._cut(numel) for numel in numels]
        chunks = [
            Chunk(flat, owner, number, *cut.chunk(number, topology.local_size))
            for flat, cut in enumerate(self._cuts)
            for owner in range(topology.world_size)
            for number in range(cut.num_chunks)
        ]
        self._node_of = {rank: node for node, ranks in enumerate(topology.nodes) for rank in ranks}

        def position(chunk: Chunk):
            first = chunk.owner * self._cuts[chunk.flat].numel + chunk.start
            own = (first / max(1, self._cuts[chunk.flat].numel), chunk.flat)
            return (0, *own) if priority is None else (priority(chunk.flat, first, chunk.count), *own)

        self.chunks = sorted((chunk for chunk in chunks if chunk.count), key=position)
        """The most urgent first."""
        part_bytes = max((cut.num_bytes for cut in self._cuts if cut.numel), default=1)
        waiting = max(1, (config.max_buffer_mib << 20) // part_bytes - (2 * topology.local_size + 2))
        owners = [self._node_of[chunk.owner] for chunk in self.chunks]
        schedule = make_schedule(owners, topology.num_nodes, waiting)
        self.schedule = schedule[topology.node]
        self.order = self._arrivals(schedule)
        """Chunks in the order in which they are added to the held weights, the same for all ranks of a node."""

    def _cut(self, numel: int) -> _Cut:
        local_size, group = self.topology.local_size, self.format.group_size
        wanted = _PART_BYTES.get(self.device.type, _PART_BYTES_ON_DEVICE)
        share = self.format.num_bytes(numel) // local_size
        fitting = (self.config.max_buffer_mib << 20) // (2 * local_size + _SPARE)
        num_chunks = max(min(_MAX_CHUNKS, share // wanted), -(-share // fitting), 1)
        part = padded(-(-numel // (num_chunks * local_size)), group)
        num_chunks = -(-numel // (part * local_size)) if numel else 0
        return _Cut(numel, num_chunks, part, self.format.num_bytes(part))

    def _arrivals(self, schedule) -> list[int]:
        """A node's own chunks are there when they are first passed on, the others when they arrive."""
        node = self.topology.node
        own = [i for i, chunk in enumerate(self.chunks) if self._node_of[chunk.owner] == node]
        order: list[int] = []
        mine = set(own)
        for sent, received in zip(schedule[node].send, schedule[node].receive, strict=True):
            if sent in mine:
                mine.remove(sent)
                order.append(sent)
            if received is not None:
                order.append(received)
        return order + sorted(mine)

    @property
    def buffer_bytes(self) -> int:
        """Memory for chunks on the way: those that wait, one that is sent, one that comes, and the one that is put
        together."""
        largest = max((cut.num_bytes for cut in self._cuts if cut.numel), default=0)
        return largest * (self.schedule.max_stored + 2 + 2 * self.topology.local_size)

    def encode(self, new: Sequence[torch.Tensor], old: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Encode the own shards and add the result to `old`, in place: to what every rank will hold.

        Args:
            new, old: float32, bfloat16 or float16 [numel], flat tensor by flat tensor: what the shards should become,
                and what the other ranks hold.

        Returns:
            uint8 [L, num_chunks, bytes of a part], by the place that carries the parts, flat tensor by flat tensor.
        """
        found = []
        for cut, target, held in zip(self._cuts, new, old, strict=True):
            self.traffic.weight_values += held.numel() * self.topology.world_size
            rows = self._own_rows(cut)
            block = self.format.encode_rows(
                target, rows, "nearest", 0, 0, rotate=False, subtract=held if self.difference else None
            )
            self.format.decode_rows(block, rows, held, add=self.difference)
            found.append(block.view(self.topology.local_size, cut.num_chunks, cut.num_bytes))
        return found

    def run(self, blocks: Sequence[torch.Tensor], flats: Sequence[torch.Tensor]) -> Iterator[int]:
        """Bring every chunk to this rank; yields how many of `order` are added to the held weights.

        Args:
            blocks: of `encode`.
            flats: [W * numel]: the held weights, with the own shards up to date.
        """
        top = self.topology
        parts = self._share_inside(blocks)
        rank_of = dict(enumerate(top.nodes[top.node]))
        place_of = {rank: place for place, rank in rank_of.items()}
        stored: dict[int, torch.Tensor] = {}
        done = 0
        if top.cross_group is None:
            for index in self.order:
                self._add(index, self._own_part(parts, place_of, index), flats)
                done += 1
                yield done
            return
        ahead = self._neighbor(1), self._neighbor(-1)
        arrived: list[tuple[int, torch.Tensor]] = []
        mine = {i for i, chunk in enumerate(self.chunks) if chunk.owner in place_of}
        for sent, received in zip(self.schedule.send, self.schedule.receive, strict=True):
            operations, coming = [], None
            if sent is not None:
                part = stored.pop(sent) if sent in stored else self._own_part(parts, place_of, sent)
                operations.append(dist.P2POp(dist.isend, part, ahead[0], top.cross_group))
                self.traffic.weight_inter += part.numel()
                if sent in mine:
                    mine.remove(sent)
                    arrived.append((sent, part))
            if received is not None:
                coming = torch.empty(
                    self._cuts[self.chunks[received].flat].num_bytes, dtype=torch.uint8, device=self.device
                )
                operations.append(dist.P2POp(dist.irecv, coming, ahead[1], top.cross_group))
            works = dist.batch_isend_irecv(operations) if operations else []
            # While these travel, what arrived before is put together and added.
            for index, part in arrived:
                self._add(index, part, flats)
                done += 1
                yield done
            arrived = []
            for work in works:
                work.wait()
            if coming is not None:
                assert received is not None
                if self._node_of[self.chunks[received].owner] != (top.node + 1) % top.num_nodes:
                    stored[received] = coming
                arrived.append((received, coming))
        for index, part in arrived + [(index, self._own_part(parts, place_of, index)) for index in sorted(mine)]:
            self._add(index, part, flats)
            done += 1
            yield done

    def _own_rows(self, cut: _Cut) -> Rows:
        """Rows (place, chunk) of the parts of the own shard."""
        if cut not in self._rows:
            size, pieces = self.topology.local_size, []
            for place in range(size):
                for number in range(cut.num_chunks):
                    start = (number * size + place) * cut.part
                    count = max(0, min(cut.numel - start, cut.part))
                    target = (place * cut.num_chunks + number) * cut.part
                    pieces.append((start if count else 0, count, target, cut.part))
            self._rows[cut] = Rows.of(size * cut.num_chunks, cut.part, pieces)
        return self._rows[cut]

    def _share_inside(self, blocks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Give every place of the node its parts; returns [L, num_chunks, bytes], by the rank that owns them."""
        if self.topology.local_group is None:
            return list(blocks)
        found = []
        for block in blocks:
            received = torch.empty_like(block)
            if block.numel():
                dist.all_to_all_single(received, block, group=self.topology.local_group)
            self.traffic.weight_intra += block.numel() - block[0].numel()
            found.append(received)
        return found

    def _own_part(self, parts: Sequence[torch.Tensor], place_of: dict[int, int], index: int) -> torch.Tensor:
        chunk = self.chunks[index]
        return parts[chunk.flat][place_of[chunk.owner], chunk.number]

    def _neighbor(self, step: int) -> int:
        top = self.topology
        rank = top.nodes[(top.node + step) % top.num_nodes][top.local_rank]
        return dist.get_global_rank(top.group, rank)

    def _add(self, index: int, part: torch.Tensor, flats: Sequence[torch.Tensor]) -> None:
        """Put a chunk together inside the node and add it to the held weights."""
        top, chunk = self.topology, self.chunks[index]
        cut = self._cuts[chunk.flat]
        whole = part.unsqueeze(0)
        if top.local_group is not None:
            whole = torch.empty(top.local_size, part.numel(), dtype=torch.uint8, device=part.device)
            all_gather_single(whole.view(-1), part, group=top.local_group)
            self.traffic.weight_intra += part.numel() * (top.local_size - 1)
        if chunk.owner == top.rank:
            return  # added when it was encoded
        first = chunk.owner * cut.numel + chunk.start
        out = flats[chunk.flat][first : first + chunk.count]
        self.format.decode_rows(whole, self._chunk_rows(cut.part, chunk.count), out, add=self.difference)

    def _chunk_rows(self, part: int, count: int) -> Rows:
        """Rows of the parts of a chunk, place by place."""
        if (part, count) not in self._rows:
            pieces = [
                (row * part, min(part, count - row * part), row * part, part)
                for row in range(self.topology.local_size)
                if count > row * part
            ]
            self._rows[part, count] = Rows.of(self.topology.local_size, part, pieces)
        return self._rows[part, count]
