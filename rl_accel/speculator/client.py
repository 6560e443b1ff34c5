"""The engine's end of the trainer process: starts it, gives it orders, and does without it when it is gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from rl_accel.speculator.config import SpeculatorConfig
from rl_accel.speculator.flat import FlatShape
from rl_accel.speculator.kinds import kind_of, shape_values
from rl_accel.speculator.lines import LineReader
from rl_accel.speculator.shared import SharedBytes
from rl_accel.speculator.traces import RowLayout, TraceRing
from rl_accel.speculator.weights import WeightSlots

RING_ROWS = 1 << 14
"""Rows of the ring; the trainer looks several times a second."""
ORDER_TIMEOUT_S = 60.0
START_TIMEOUT_S = 180.0
"""For the first answer: the process imports torch first, on cores that may be busy."""


class TrainerClient:
    """Shared memory and the process that reads and writes it."""

    def __init__(self, shape: FlatShape, layout: RowLayout, config: SpeculatorConfig, first: torch.Tensor):
        self.shape, self.layout, self.config = shape, layout, config
        self.ring = TraceRing(layout, RING_ROWS)
        kind = kind_of(shape)
        self.slots = WeightSlots(kind.num_folded(shape), shape.fingerprint())
        self.slots.put(kind.fold(shape, first).numpy())
        self._first = SharedBytes(4 * shape.num_weights, "rl_accel-first")
        self._first.data.view(np.float32)[:] = first.numpy()
        self._process: subprocess.Popen | None = None
        self._unread = 0
        self._is_ready = False

    def start(self) -> None:
        """Start the process; it needs some seconds until it trains, and nobody waits for it."""
        blocks = {"ring": self.ring.memory, "slots": self.slots.memory, "first": self._first}
        descriptors = {name: block.descriptor for name, block in blocks.items()}
        settings = {
            "config": asdict(self.config),
            "shape": shape_values(self.shape),
            "layout": asdict(self.layout),
            "capacity": self.ring.capacity,
            **descriptors,
        }
        threads = str(self.config.threads)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rl_accel.speculator.process", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=tuple(descriptors.values()),
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""},
        )
        assert self._process.stdout is not None
        self._answers = LineReader(self._process.stdout.fileno())

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def wait_ready(self) -> bool:
        """Wait until the process is there and has opened its state; False where that takes too long. Called once,
        right after `start`, or not at all."""
        return self._next_answer() is not None

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        """Give an order and wait for the answer.

        Returns:
            The answer; `{"error": str}` where the process is gone, does not answer in time, or could not do it.
        """
        if not self.tell(do, **values):
            return {"error": "the trainer of the speculator is gone"}
        answer: dict[str, Any] = {"error": "the trainer of the speculator does not answer"}
        while self._unread:
            line = self._line()
            if line is None:
                return answer
            answer = line
        return answer

    def tell(self, do: str, **values: Any) -> bool:
        """Give an order without waiting for the answer."""
        if not self.alive:
            return False
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **values}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            return False
        self._unread += 1
        return True

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _line(self) -> dict[str, Any] | None:
        """Return the next answer."""
        while True:
            answer = self._next_answer()
            if answer is None:
                return None
            if "ready" not in answer:
                self._unread -= 1
                return answer

    def _next_answer(self) -> dict[str, Any] | None:
        answer = self._answers.next(ORDER_TIMEOUT_S if self._is_ready else START_TIMEOUT_S)
        self._is_ready = self._is_ready or answer is not None
        return answer
