"""A rank of bench_comm.py: one engine, and orders to train some steps of it with one kind of communication.

Steps are timed one by one between barriers, which the times leave out. Bytes are those that the node's interface
counted between two barriers; the barriers themselves send less than a kilobyte.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import logging
import os
import re
import time
from pathlib import Path
from typing import Any

import comm_ranks
import torch
import torch.distributed as dist
from comm_bench_engines import LENGTH, OnDeepSpeed, OnFSDP2, make_model
from slow_network import sent_bytes

from rl_accel.quickstart.tiny_gpt import MarkovText

_COUNTED = ("gradients_s", "weights_s", "gradient_inter_bytes", "weight_inter_bytes")
"""Figures of a handle that grow from step to step."""
NUM_BATCHES = 8


class Rank:
    """The handlers of a rank; all ranks get the same orders."""

    def __init__(self) -> None:
        from deepspeed.utils import logger

        from rl_accel.hosts.deepspeed import load

        logger.setLevel(logging.ERROR)
        load("cpu").init_distributed(dist_backend="gloo", verbose=False)
        self._states: dict[str, dict[str, Any]] = {}
        self._engine: Any = None
        self._kept: list[Any] = []

    def build(
        self,
        width: int,
        layers: int,
        zero: dict[str, Any] | None = None,
        reduce_dtype: str = "bfloat16",
        sequences: int = 1,
        device_ms: float = 0.0,
    ) -> int:
        """Make the engine, DeepSpeed with the options `zero` or FSDP2 without any; returns its number of parameters."""
        model = make_model(width, layers, device_ms)
        self._engine = OnFSDP2(model, reduce_dtype) if zero is None else OnDeepSpeed(model, zero, sequences)
        text = MarkovText(LENGTH)
        self._batches = [text.batch(sequences, seed=1000 * dist.get_rank() + i) for i in range(NUM_BATCHES)]
        self._num_steps = 0
        return self._engine.num_parameters

    def measure(
        self, settings: dict[str, Any] | None, steps: int, state: str | None = None, split: bool = False
    ) -> dict[str, Any]:
        """Train some steps, after one that does not count: what a step leaves to the next one is in the times of both.

        Args:
            settings: of SDP4BitConfig; None: the host with nothing attached; {"optimizer": {...}}: attributes of its
                optimizer meanwhile, nothing attached.
            steps: optimizer steps.
            state: name under which the handle's state lives on until the next call.
            split: count the bytes of the backward pass and of the optimizer step apart, with a barrier between them.

        Returns:
            `step_s`, seconds a step of this rank; `sent`, bytes sent by this node in all steps, or [backward,
            optimizer step] with `split`; `stats` of the handle, {} without one.
        """
        own = dict((settings or {}).get("optimizer", {}))
        before = self._engine.set(own)
        handle = None if settings is None or own else self._engine.attach(settings)
        if handle is not None and state in self._states:
            handle.load_state_dict(self._states[state])
        self._backward()
        self._engine.step()
        before_steps = {} if handle is None else handle.stats()
        seconds, marks = [], []
        for _ in range(steps):
            marks.append(_count())
            start = time.perf_counter()
            self._backward()
            if split:
                marks.append(_count())
            self._engine.step()
            seconds.append(time.perf_counter() - start)
        marks.append(_count())
        sent = [after - before for before, after in itertools.pairwise(marks)]
        answer: dict[str, Any] = {
            "step_s": seconds,
            "sent": [sum(sent[::2]), sum(sent[1::2])] if split else sum(sent),
            "stats": {},
        }
        if handle is not None:
            answer["stats"] = handle.stats()
            for name in _COUNTED:
                answer["stats"][name] -= before_steps[name]
            if state is not None:
                self._states[state] = handle.state_dict()
            handle.detach()
        self._engine.set(before)
        return answer

    def check(self) -> str:
        """Compare the ranks' weights, after a step; returns their digest. Raises CommError if they differ."""
        handle = self._engine.attach({"bypass": "never"})
        for _ in range(2):  # FSDP2 fills secondary shards in the first and sends differences in the second
            self._backward()
            self._engine.step()
        digest = handle.check_replicas()
        handle.detach()
        return digest

    def measure_memory(
        self, width: int, layers: int, zero: dict[str, Any], settings: dict[str, Any] | None, steps: int
    ) -> dict[str, Any]:
        """Make an engine and train some steps of it after warm-up. Engines before it stay, so that what they free does
        not count for this one.

        Returns:
            `parameters`; `peak_bytes`, the most memory that model, optimizer and communication took in a step, over
            what the process had before; `sent`, bytes sent by this node in all steps.
        """
        self._kept.append(self._engine)
        _free()
        base = _status_bytes("VmRSS")
        num_parameters = self.build(width, layers, zero)
        handle = None if settings is None else self._engine.attach(settings)
        for step in range(-2, steps):
            if step == 0:
                _free()
                Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
                before = _count()
            self._backward()
            self._engine.step()
        sent = _count() - before
        peak = _status_bytes("VmHWM") - base
        if handle is not None:
            handle.detach()
        return {"parameters": num_parameters, "peak_bytes": peak, "sent": sent}

    def _backward(self) -> None:
        loss = self._engine.backward(self._batches[self._num_steps % NUM_BATCHES])
        self._num_steps += 1
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss is {loss.item()} after {self._num_steps} steps")


def _count() -> int:
    dist.barrier()
    return sent_bytes()


def _free() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    torch.set_num_threads(1)
    comm_ranks.serve(Rank)
