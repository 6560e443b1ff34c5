"""The process that drafts ahead: `python -m rl_accel.draft.ahead.process SETTINGS`, started by `client.py`.

It reads what the policy has written, writes on behind it, a token a packet, the text that is least ahead first, and
ends with the engine. Its model is computed in float32 on one core.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from rl_accel.draft.ahead.lean import model_of
from rl_accel.draft.ahead.messages import MAX_BYTES, Kind, Packet, Sampling
from rl_accel.draft.ahead.writer import Text, Writer
from rl_accel.processes import end_with_parent

RATE = 0.05
"""Of the running mean of a token's seconds."""


class Loop:
    """Packets in, packets out."""

    def __init__(self, link: socket.socket, writer: Writer):
        self.link, self.writer = link, writer
        self.seconds = 0.0
        self._changed = False

    def run(self) -> None:
        """Work until the engine is gone.

        Raises:
            ConnectionError: if it goes in the middle.
        """
        while True:
            number = self.writer.next()
            if not self._read(wait=number is None):
                return
            number = self.writer.next() if self._changed else number
            if number is not None:
                self._write(number)

    def _read(self, wait: bool) -> bool:
        """Take all packets that are there; False when the engine is gone."""
        self._changed = False
        flags = 0 if wait else socket.MSG_DONTWAIT
        while True:
            try:
                data = self.link.recv(MAX_BYTES, flags)
            except BlockingIOError:
                return True
            if not data:
                return False
            self._take(Packet.unpack(data))
            self._changed = True
            flags = socket.MSG_DONTWAIT

    def _take(self, packet: Packet) -> None:
        if packet.kind is Kind.BEGIN:
            self.writer.begin(packet.text, packet.tokens, packet.sampling, packet.position)
        elif packet.kind is Kind.END:
            self.writer.end(packet.text)
        elif packet.kind is Kind.VERIFIED and packet.text in self.writer.texts:
            text = self.writer.texts[packet.text]
            text.verify(packet.position, packet.tokens)
            text.num_read = packet.count

    def _write(self, number: int) -> None:
        text = self.writer.texts[number]
        started, position = time.perf_counter(), len(text.ids)
        token = self.writer.write(number)
        seconds = time.perf_counter() - started
        if text.num_ahead > 1:  # the first one after a change has more than one token to read
            self.seconds += RATE * (seconds - self.seconds) if self.seconds else seconds
        packet = Packet(Kind.TOKENS, number, text.num_read, position, seconds=self.seconds, tokens=[token])
        self.link.send(packet.pack())


def main() -> None:
    settings = json.loads(sys.argv[1])
    end_with_parent()
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # the engine may have bound itself to other cores
    torch.set_num_threads(1)
    disable_progress_bar()
    model = model_of(AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32).eval())
    trial = Text(model.new_cache(), [0], Sampling(temperature=1.0), limit=8)  # the first passes are slow
    for _ in range(4):
        trial.write(model)
    link = socket.socket(fileno=settings["descriptor"])
    with contextlib.suppress(ConnectionError):
        link.send(Packet(Kind.READY, position=model.vocab_size).pack())
        Loop(link, Writer(model, settings["stop_token_ids"], settings["max_ahead"], settings["vocab_size"])).run()


if __name__ == "__main__":
    main()
