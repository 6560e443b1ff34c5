"""The engine's end of the process that drafts ahead: starts it, tells it what the policy writes, keeps what it drafts.

Both ends go on without waiting for each other, so packets cross: a draft may belong to a text that the policy has left
meanwhile. A packet of drafts says how many packets about the policy's text were read before, and `Draft` forgets what
was written before the packet with which the policy left the draft.
"""

from __future__ import annotations

import bisect
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from rl_accel.draft.ahead.messages import MAX_BYTES, MAX_TOKENS, Kind, Packet, Sampling

END_S = 5.0


class Draft:
    """A text as the engine knows it, and the tokens drafted behind it."""

    def __init__(self, number: int, ids: Sequence[int]):
        self.number, self.ids = number, list(ids)
        self.ahead: list[int] = []
        """Drafted tokens that follow `ids`."""
        self._ends: list[int] = []
        """Of the packets that said what was verified: length of the text behind each."""
        self._valid_from = 0
        """Drafts that were written before so many of them were read are of a text that the policy has left."""
        self._next = len(self.ids)
        """Position of the next token that is expected; before the end of `ids` where the process is behind."""

    @property
    def num_sent(self) -> int:
        """Packets that said what was verified."""
        return len(self._ends)

    def verify(self, tokens: Sequence[int]) -> None:
        """Take what the policy wrote; the packet that says so is the next one sent."""
        known = self.ahead[: len(tokens)]
        self.ids += tokens
        self._ends.append(len(self.ids))
        if known == list(tokens[: len(known)]):
            self.ahead = self.ahead[len(tokens) :]
        else:
            self._leave(self.num_sent)

    def receive(self, position: int, count: int, tokens: Sequence[int]) -> None:
        """Take drafted tokens."""
        if count < self._valid_from or position > len(self.ids) + len(self.ahead):
            return
        if position != self._next:  # the process has been told of another text, and begins behind that
            self._next = position
            del self.ahead[max(position - len(self.ids), 0) :]
        for token in tokens:
            if self._next >= len(self.ids):
                self.ahead.append(token)
            elif token != self.ids[self._next]:
                self._leave(bisect.bisect_right(self._ends, self._next) + 1)
                return
            self._next += 1

    def _leave(self, valid_from: int) -> None:
        self.ahead, self._valid_from, self._next = [], valid_from, len(self.ids)


class AheadClient:
    """The process and its texts."""

    def __init__(self, model: str, stop_token_ids: Sequence[int], max_ahead: int, vocab_size: int | None = None):
        """As `Writer` takes them; `model`: a folder or a name on the hub."""
        self.drafts: dict[int, Draft] = {}
        self.vocab_size: int | None = None
        """Of the model, once it is there."""
        self.seconds = 0.0
        """A drafted token's, running mean."""
        self._numbers = 0
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = {
            "model": model,
            "stop_token_ids": [int(token) for token in stop_token_ids],
            "max_ahead": max_ahead,
            "vocab_size": vocab_size,
            "descriptor": theirs.fileno(),
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rl_accel.draft.ahead.process", json.dumps(settings)],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            )
        self._lost = False
        self._poll = select.poll()
        self._poll.register(self._link, select.POLLIN)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return not self._lost and self._process.poll() is None

    @property
    def ready(self) -> bool:
        """Whether it drafts."""
        if self.vocab_size is None:
            self.read()
        return self.vocab_size is not None and not self._lost

    def wait_ready(self, seconds: float) -> bool:
        """Wait until the model is there; False where it does not come."""
        deadline = time.monotonic() + seconds
        while not self.ready and self.alive and time.monotonic() < deadline:
            self.read(0.1)
        return self.ready

    def begin(self, ids: Sequence[int], sampling: Sampling, limit: int) -> Draft | None:
        """Have a text written on; None where it is too long for a packet."""
        if len(ids) > MAX_TOKENS:
            return None
        self._numbers += 1
        draft = self.drafts[self._numbers] = Draft(self._numbers, ids)
        self._send(Packet(Kind.BEGIN, draft.number, position=limit, sampling=sampling, tokens=ids))
        return draft

    def verify(self, draft: Draft, tokens: Sequence[int]) -> None:
        """Say what the policy wrote behind what it had written before."""
        position = len(draft.ids)
        draft.verify(tokens)
        packet = Packet(Kind.VERIFIED, draft.number, draft.num_sent, position, tokens=tokens)
        self._send(packet)

    def end(self, draft: Draft) -> None:
        """Forget a text."""
        if self.drafts.pop(draft.number, None) is not None:
            self._send(Packet(Kind.END, draft.number))

    def read(self, seconds: float = 0.0) -> bool:
        """Take all packets that are there, waiting so long for the first; whether there was one."""
        if self._lost or (seconds > 0.0 and not self._poll.poll(1e3 * seconds)):
            return False
        found = False
        while True:
            try:
                data = self._link.recv(MAX_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return found
            except OSError:
                data = b""
            if not data:
                self._lost = True
                return found
            self._take(Packet.unpack(data))
            found = True

    def _take(self, packet: Packet) -> None:
        if packet.kind is Kind.READY:
            self.vocab_size = packet.position
        elif packet.kind is Kind.TOKENS:
            self.seconds = packet.seconds
            if packet.text in self.drafts:
                self.drafts[packet.text].receive(packet.position, packet.count, packet.tokens)

    def _send(self, packet: Packet) -> None:
        """Send, or give the process up: one that does not read would hold the engine."""
        try:
            self._link.send(packet.pack(), socket.MSG_DONTWAIT)
        except OSError:
            self._lost = True

    def close(self) -> None:
        """End the process."""
        self._lost = True
        self._link.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
