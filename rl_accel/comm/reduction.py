"""The two-level quantized reduction of gradients, balanced over links whatever the buckets are.

`add` takes a bucket: its values are rotated, cut up by its plan (plan.py), summed inside the node with 8-bit codes and
kept as 4-bit codes. `flush` sends what was kept between nodes, in one exchange in which every node has the same to send
to every other one, sums it, rotates it back and hands it to its owners. With one rank a node the first hop is left out;
with one node the second.

Not covered: overlap of the hop between nodes with the backward pass; it starts when the last bucket is there.
Memory of a rank: the codes that wait, 4.25 bits of P / L values; buffers of the exchange, at most `max_buffer_mib`; the
sums, 4 bytes of P / W values.
Source: SDP4Bit §3.2; ours: the queue, the balance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from rl_accel.comm import wire
from rl_accel.comm.config import SDP4BitConfig
from rl_accel.comm.plan import BucketPlan, Piece, make_plan
from rl_accel.comm.topology import Topology
from rl_accel.comm.traffic import Traffic
from rl_accel.kernels.common.noise import fold_key

HOP_ONE, HOP_TWO = 1, 2
_MAX_PLANS = 4096
"""Kinds of buckets that plans are kept for; a training has a few."""

Deliver = Callable[[int, torch.Tensor], None]
"""Takes the sums of some values of a bucket that this rank owns, float32, and the index of the first in the bucket."""


@dataclass(frozen=True)
class _Waiting:
    """A bucket whose sums inside the node wait for the exchange between nodes."""

    plan: BucketPlan
    block: torch.Tensor
    """uint8: this place's row in the format of the second hop."""
    deliver: Deliver


class Reduction:
    """Sums of gradients over the ranks of one data-parallel group. All ranks make the same calls in the same order.

    Attributes:
        calls: buckets so far: part of the key of the rounding noise, kept in checkpoints.
    """

    def __init__(self, topology: Topology, config: SDP4BitConfig, traffic: Traffic):
        self.topology, self.config, self.traffic = topology, config, traffic
        self.calls = 0
        self._first = wire.Format(config.intra_bits, config.gradient_group_size, config.backend)
        self._second = wire.Format(config.inter_bits, config.gradient_group_size, config.backend)
        self._waiting: list[_Waiting] = []
        self._plans: dict[tuple[tuple[int, int], ...], BucketPlan] = {}

    @property
    def pending(self) -> int:
        """Buckets that wait for `flush`."""
        return len(self._waiting)

    def add(self, values: torch.Tensor, slices: Sequence[tuple[int, int]], deliver: Deliver) -> None:
        """Start the reduction of a bucket; `values` may be overwritten afterwards.

        Args:
            values: float32, bfloat16 or float16 [n], contiguous, this rank's summands.
            slices: (owner, values) in the order of the bucket, the same on all ranks.
            deliver: called in `flush` with what this rank owns of the sum.
        """
        self.calls += 1
        self.traffic.gradient_values += values.numel()
        plan = self._plan(slices)
        row_numel = plan.rows.numel
        if not row_numel:
            return
        if self.topology.local_group is None:
            block = self._second.encode_rows(values, plan.rows, *self._noise(HOP_TWO), rotate=self.config.hadamard)[0]
        else:
            rows = self._first.encode_rows(values, plan.rows, *self._noise(HOP_ONE), rotate=self.config.hadamard)
            received = torch.empty_like(rows)
            dist.all_to_all_single(received, rows, group=self.topology.local_group)
            self.traffic.gradient_intra += rows.numel() - rows[0].numel()
            if self.topology.cross_group is None:
                block = received  # the sum of one hop is decoded at once
            else:
                block = torch.empty(self._second.num_bytes(row_numel), dtype=torch.uint8, device=values.device)
                self._second.requantize(
                    received, row_numel, self._first, block, *self._noise(HOP_TWO), rotate=self.config.hadamard
                )
        self._waiting.append(_Waiting(plan, block, deliver))

    def flush(self) -> None:
        """Finish the reduction of all buckets that were added."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        sums = self._sum_of_nodes(waiting) if self.topology.cross_group is not None else self._sum_of_node(waiting)
        self._hand_out(waiting, sums)

    def _plan(self, slices: Sequence[tuple[int, int]]) -> BucketPlan:
        key = tuple(slices)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            plan = self._plans[key] = make_plan(key, self.topology, self.config.gradient_group_size)
        return plan

    def _noise(self, hop: int) -> tuple[str, int, int]:
        """Rounding, key and offset of a hop's codes."""
        return self.config.gradient_rounding, fold_key(self.config.seed, self.calls, hop, self.topology.rank), 0

    def _sum_of_node(self, waiting: list[_Waiting]) -> torch.Tensor:
        sums = []
        for bucket in waiting:
            total = torch.empty(bucket.plan.rows.numel, dtype=torch.float32, device=bucket.block.device)
            self._first.decode_sum(bucket.block, total, rotated=self.config.hadamard)
            used = bucket.plan.row_groups[self.topology.local_rank] * self.config.gradient_group_size
            sums.append(total[:used])
        return torch.cat(sums)

    def _sum_of_nodes(self, waiting: list[_Waiting]) -> torch.Tensor:
        """Exchange columns between nodes, some groups of every column at a time; returns the sums of this rank's
        column, bucket after bucket."""
        top, group_size = self.topology, self.config.gradient_group_size
        columns = [bucket.plan.columns[top.local_rank] for bucket in waiting]
        totals = [sum(row[node].num_groups for row in columns) for node in range(top.num_nodes)]
        group_bytes = self._second.num_bytes(group_size)
        own = totals[top.node]
        sums = torch.empty(own * group_size, dtype=torch.float32, device=waiting[0].block.device)
        # Every rank must cut into the same number of chunks, whatever its own column is.
        num_chunks = self._num_chunks(waiting, group_bytes)
        starts = [0] * len(totals)
        for chunk in range(num_chunks):
            ends = [total * (chunk + 1) // num_chunks for total in totals]
            views: list[torch.Tensor] = []
            for node in range(top.num_nodes):
                views += self._views(waiting, columns, node, starts[node], ends[node])
            send = torch.cat(views) if views else torch.empty(0, dtype=torch.uint8, device=sums.device)
            sizes = [(end - start) * group_bytes for start, end in zip(starts, ends, strict=True)]
            received = torch.empty(top.num_nodes, sizes[top.node], dtype=torch.uint8, device=sums.device)
            dist.all_to_all_single(
                received.view(-1), send, [sizes[top.node]] * top.num_nodes, sizes, group=top.cross_group
            )
            self.traffic.gradient_inter += send.numel() - sizes[top.node]
            part = sums[starts[top.node] * group_size : ends[top.node] * group_size]
            self._second.decode_sum(received, part, rotated=self.config.hadamard)
            starts = ends
        return sums

    def _num_chunks(self, waiting: list[_Waiting], group_bytes: int) -> int:
        per_place = [
            sum(bucket.plan.row_groups[place] for bucket in waiting) for place in range(self.topology.local_size)
        ]
        per_column = max(
            sum(bucket.plan.columns[place][node].num_groups for bucket in waiting)
            for place in range(self.topology.local_size)
            for node in range(self.topology.num_nodes)
        )
        most = (max(per_place) + per_column * self.topology.num_nodes) * group_bytes
        return max(1, -(-most // (self.config.max_buffer_mib << 20)))

    def _views(self, waiting, columns, node: int, start: int, end: int) -> list[torch.Tensor]:
        """Groups [start, end) of what goes to a node, as the codes and then the scales of one block."""
        codes, scales = [], []
        code_bytes, scale_bytes = self._second.group_bytes
        position = 0
        for bucket, row in zip(waiting, columns, strict=True):
            before = sum(column.num_groups for column in row[:node])
            here = row[node].num_groups
            low, high = max(start - position, 0), min(end - position, here)
            position += here
            if low >= high:
                continue
            low, high = before + low, before + high
            codes.append(bucket.block[low * code_bytes : high * code_bytes])
            if scale_bytes:
                first = bucket.plan.rows.numel // self.config.gradient_group_size * code_bytes
                scales.append(bucket.block[first + low * scale_bytes : first + high * scale_bytes])
        return codes + scales

    def _hand_out(self, waiting: list[_Waiting], sums: torch.Tensor) -> None:
        """Give the sums of this place's column to the ranks of the node that own them."""
        top = self.topology
        ranks = top.nodes[top.node]
        mine: list[tuple[_Waiting, Piece, torch.Tensor]] = []
        outgoing: list[list[torch.Tensor]] = [[] for _ in ranks]
        incoming: list[list[tuple[_Waiting, Piece]]] = [[] for _ in ranks]
        moved = False
        position = 0
        for bucket in waiting:
            for place in range(top.local_size):
                column = bucket.plan.columns[place][top.node]
                for piece in column.pieces:
                    moved |= piece.owner != ranks[place]
                    if place == top.local_rank:
                        part = sums[position : position + piece.count]
                        position += self._padded(piece.count)
                        if piece.owner == top.rank:
                            mine.append((bucket, piece, part))
                        else:
                            outgoing[ranks.index(piece.owner)].append(part)
                    elif piece.owner == top.rank:
                        incoming[place].append((bucket, piece))
        if moved:
            mine += self._exchange_moved(outgoing, incoming, sums)
        for bucket, piece, part in mine:
            bucket.deliver(piece.start, part)

    def _exchange_moved(self, outgoing, incoming, sums: torch.Tensor):
        """Send sums to the ranks of the node that own them, in float32."""
        top = self.topology
        parts = [part for parts in outgoing for part in parts]
        send = torch.cat(parts) if parts else sums.new_empty(0)
        sizes = [sum(part.numel() for part in parts) for parts in outgoing]
        wanted = [sum(piece.count for _, piece in pieces) for pieces in incoming]
        received = sums.new_empty(sum(wanted))
        dist.all_to_all_single(received, send, wanted, sizes, group=top.local_group)
        self.traffic.gradient_intra += send.numel() * send.element_size()
        pieces = [pair for pairs in incoming for pair in pairs]
        parts = received.split([piece.count for _, piece in pieces])
        return [(bucket, piece, part) for (bucket, piece), part in zip(pieces, parts, strict=True)]

    def _padded(self, count: int) -> int:
        size = self.config.gradient_group_size
        return -(-count // size) * size
