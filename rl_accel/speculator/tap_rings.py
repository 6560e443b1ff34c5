"""Traces of the policy's training ranks on this node: a ring per rank, found by its name.

A rank makes an anonymous block of shared memory (`shared.py`) whose name has the run in it. The trainers of all heads
on the node find it in /proc, among the open files of this user's processes, and map it. So nobody has to introduce
them, nothing is left behind when either is killed, and ranks on other nodes are not seen. What a dead rank has left is
read to its end.

Cost: rings of at most `RING_BYTES`, and for a reader a look through /proc every `SEARCH_S` seconds, some milliseconds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from rl_accel.speculator.replay import Replay
from rl_accel.speculator.shared import HEADER_BYTES
from rl_accel.speculator.traces import RowLayout, TraceRing

RING_ROWS = 1 << 13
RING_BYTES = 64 << 20
SEARCH_S = 5.0
MAX_PUT = 512
"""Rows that a rank writes at once, at most; a reader keeps so far away from those that come next."""
LAYOUT = 1
"""Word of the header: what rows look like."""


def make_ring(layout: RowLayout, run: str) -> TraceRing:
    """Return the ring of a training rank of a run."""
    capacity = min(RING_ROWS, max(RING_BYTES // layout.row_bytes, 2 * MAX_PUT))
    ring = TraceRing(layout, capacity, name=_name(run))
    ring.memory.words[LAYOUT] = _fingerprint(layout)
    return ring


@dataclass
class _Found:
    ring: TraceRing
    pid: int
    seen: int


class TapRings:
    """The rings of a run on this node, as one trainer of a head reads them."""

    def __init__(self, layout: RowLayout, run: str):
        self.layout, self.run = layout, run
        self.num_rows, self.num_failed = 0, 0
        """Rows taken, and rings that could not be mapped."""
        self._rings: dict[int, _Found] = {}
        self._known: set[int] = set()
        """Blocks of memory that were looked at before."""
        self._taken: set[int] = set()
        """Requests whose rows came from here."""
        self._searched, self._step = -SEARCH_S, 0

    def feed(self, replay: Replay) -> None:
        """Give `replay` what ranks have written since, except of requests that an engine has left traces of.

        A rank writes the training step instead of the policy's version; it ran the policy whose rollouts came last.
        """
        now = time.monotonic()
        if now - self._searched >= SEARCH_S:
            self._search()
            self._searched = now
        for block, found in list(self._rings.items()):
            alive = os.path.exists(f"/proc/{found.pid}")
            rows = self._take(found)
            if not alive:
                found.ring.memory.close()
                del self._rings[block]
            if not len(rows["request"]):
                continue
            self.num_rows += len(rows["request"])
            self._taken = {name for name in self._taken if replay.knows(name)}
            new = {name for name in set(rows["request"].tolist()) if name in self._taken or not replay.knows(name)}
            self._taken |= new
            keep = np.isin(rows["request"], np.fromiter(new, np.int64, len(new)))
            self._step = max(self._step, int(rows["policy"].max()))
            rows["policy"] = np.maximum(replay.policy - (self._step - rows["policy"]), 0)
            replay.add({name: values[keep] for name, values in rows.items()})

    @staticmethod
    def _take(found: _Found) -> dict[str, npt.NDArray]:
        found.seen, rows, _ = found.ring.take(found.seen)
        first = found.seen - len(rows["request"])
        risky = max(found.ring.num_written - found.ring.capacity + MAX_PUT - first, 0)  # maybe being written over
        return {name: values[risky:] for name, values in rows.items()} if risky else rows

    def _search(self) -> None:
        for pid, descriptor, block in _blocks(_name(self.run)):
            if block in self._known:
                continue
            self._known.add(block)
            try:
                mine = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
            except OSError:  # the rank has ended in between, or may not be looked at
                self.num_failed += 1
                continue
            capacity, rest = divmod(os.fstat(mine).st_size - HEADER_BYTES, self.layout.row_bytes)
            ring = TraceRing(self.layout, capacity, mine) if capacity > MAX_PUT and not rest else None
            if ring is None or int(ring.memory.words[LAYOUT]) != _fingerprint(self.layout):
                os.close(mine)
                self.num_failed += 1
                continue
            self._rings[block] = _Found(ring, pid, max(ring.num_written - capacity, 0))


def _blocks(name: str) -> Iterator[tuple[int, int, int]]:
    """Yield process, descriptor and inode of shared memory of a name that processes of this user have open."""
    wanted, user = f"/memfd:{name} (deleted)", os.getuid()
    for process in os.scandir("/proc"):
        try:
            if not process.name.isdigit() or process.stat().st_uid != user:
                continue
            for descriptor in os.listdir(f"/proc/{process.name}/fd"):
                path = f"/proc/{process.name}/fd/{descriptor}"
                if os.readlink(path) == wanted:
                    yield int(process.name), int(descriptor), os.stat(path).st_ino
        except OSError:  # it has ended, or may not be looked at
            continue


def _name(run: str) -> str:
    return f"rl_accel-tap-{run}"


def _fingerprint(layout: RowLayout) -> int:
    return int.from_bytes(blake2b(repr(sorted(layout.fields().items())).encode(), digest_size=7).digest(), "little")
