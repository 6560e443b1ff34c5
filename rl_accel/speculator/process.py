"""The trainer of the draft head, a process beside the engine: `python -m rl_accel.speculator.process SETTINGS`.

It is handed two blocks of shared memory as descriptors and takes orders as JSON lines on its standard input: `save` and
`open` with the path of a checkpoint, `serve` with the version that the engine went back to, `follow` with the run whose
training ranks leave traces too. It ends when that input does. It trains while traces arrive, `REUSE` times on each,
within its share of the time, and sleeps otherwise. A server's trainer also keeps a file over restarts (`state.py`),
which it writes before it ends.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rl_accel.processes import end_with_parent
from rl_accel.speculator.gate import SwapGate
from rl_accel.speculator.kinds import kind_of, new_head, shape_of, shape_values
from rl_accel.speculator.learner import Learner, step_seconds
from rl_accel.speculator.lines import LineReader
from rl_accel.speculator.pace import Pace
from rl_accel.speculator.replay import Batch, Replay
from rl_accel.speculator.shared import SharedBytes
from rl_accel.speculator.state import StateFile
from rl_accel.speculator.tap_rings import TapRings
from rl_accel.speculator.traces import RowLayout, TraceRing
from rl_accel.speculator.weights import WeightSlots

MIN_ROWS = 512
"""Rows from which on it trains."""
REUSE = 16.0
"""Times that a row is learned from, on average."""
IDLE_S = 1.0
"""Without new rows for so long, the engine is not generating and others need the processor."""
NAP_S = 0.02
SLICE_S = 0.5
"""It trains for so long before it rests, so that an engine which leaves it a core does not have to change often."""
HELD_OUT_TOKENS = 2048


class TrainerProcess:
    """The loop. Settings: what `TrainerClient.start` writes."""

    def __init__(self, settings: dict[str, Any]):
        config = settings["config"]
        torch.set_num_threads(config["threads"])
        self.shape = shape_of(settings["shape"])
        self.kind = kind_of(self.shape)
        layout = RowLayout(**settings["layout"])
        self.ring = TraceRing(layout, settings["capacity"], settings["ring"])
        self.slots = WeightSlots(self.kind.num_folded(self.shape), self.shape.fingerprint(), settings["slots"])
        first = SharedBytes(4 * self.shape.num_weights, descriptor=settings["first"])
        flat = torch.from_numpy(first.data.view(np.float32).copy())
        self.config = config
        self._orders_in = LineReader(sys.stdin.fileno())
        self.replay = Replay(layout, config["replay_tokens"], config["max_policy_lag"], config["seed"])
        self.learner = Learner(self.shape, flat, config["learning_rate"], config["depth"], config["rejected_weight"])
        scratch = Learner(self.shape, flat, config["learning_rate"], config["depth"])
        self.slots.report(train_step_s=step_seconds(scratch, layout, config["batch_tokens"]))
        self.gate = SwapGate(new_head(self.shape), config["depth"])
        self.gate.serve(flat)
        self.pace = Pace()
        self.taps: TapRings | None = None
        self._published = {self.slots.version: flat}
        self._order = deque([self.slots.version])
        self._seen, self._lost, self._refused = self.ring.num_written, 0, 0
        self._train_s, self._last_rows, self._last_publish = 0.0, 0.0, time.monotonic()
        self._tokens_learned, self._steps_before = 0, 0
        self._steps_at_publish = 0
        self._rested_from, self._slice_s = 0.0, 0.0
        self.ended = False
        self.state = StateFile(config["state"], self._save, self._open)
        self.state.restore(self._progress)

    def run(self) -> None:
        """Train until the standard input ends, or `ended` is set."""
        while self._orders() and not self.ended:
            self.state.keep(self._progress())
            self._take_rows()
            trains = self._may_train()
            self.slots.report(busy=trains)
            if not trains:
                time.sleep(NAP_S)
                continue
            self._train()
            if time.monotonic() - self._last_publish >= self.config["publish_s"]:
                self._publish()
        self.state.keep(self._progress(), now=True)

    def _progress(self) -> tuple[int, int]:
        return self.slots.version, self.learner.num_steps

    def _orders(self) -> bool:
        while (order := self._orders_in.next()) is not None:
            try:
                answer = getattr(self, "_" + order["do"])(order)
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), flush=True)
        return not self._orders_in.ended

    def _take_rows(self) -> None:
        self._seen, rows, lost = self.ring.take(self._seen)
        self._lost += lost
        if len(rows["request"]):
            if not self._rested_from:
                self._rested_from = time.monotonic()  # who may train little does not begin with that
            self.replay.add(rows)
            self._last_rows = time.monotonic()
        if self.taps is not None and self._share() > 0.0:
            self.taps.feed(self.replay)  # while ranks compute, others need the processor: these rows wake nobody
            self.slots.report(rank_rows=self.taps.num_rows)

    def _may_train(self) -> bool:
        share = self._share()
        now = time.monotonic()
        return (
            share > 0.0
            and not self.slots.paused
            and now - self._rested_from >= (0.0 if self._slice_s else SLICE_S * (1.0 / share - 1.0))
            and now - self._last_rows < IDLE_S
            and len(self.replay) >= MIN_ROWS
            and self._tokens_learned < REUSE * self.replay.num_rows
        )

    def _train(self) -> None:
        started, cpu = time.monotonic(), time.process_time()
        held_out = self._held_out() if self.learner.trial_is_due else None
        if held_out is not None:
            self.learner.try_rejected_weight(self._batch, held_out)
        elif (batch := self._batch()) is not None:
            self.learner.step(batch)
        self._train_s += time.process_time() - cpu
        self._slice_s += time.monotonic() - started
        if self._slice_s >= SLICE_S:
            self._rested_from, self._slice_s = time.monotonic(), 0.0
            self._report()

    def _share(self) -> float:
        """Of the time, that it may train in."""
        return min(self.slots.allowed_share, self.config["max_share"], self.pace.share)

    def _batch(self) -> Batch | None:
        batch = self.replay.sample(self.config["batch_tokens"])
        if batch is None:
            time.sleep(NAP_S)
        else:
            self._tokens_learned += int(batch.valid_BT.sum())
        return batch

    def _held_out(self) -> Batch | None:
        return self.replay.sample(HELD_OUT_TOKENS, held_out=True)

    def _publish(self) -> None:
        """Offer the present weights to the gate."""
        held_out = self._held_out()
        if held_out is None or self.learner.num_steps == self._steps_at_publish:
            return
        self._last_publish, self._steps_at_publish = time.monotonic(), self.learner.num_steps
        flat = self.learner.average.clone()
        if self.gate.admit(flat, held_out):
            self._refused += 1
            if not torch.isfinite(flat).all():
                self._restart_from_served()
        else:
            self._put(flat)
        self.pace.observe(self._train_s, self.gate.candidate_accept, self.gate.served_accept)
        self._report()

    def _put(self, flat: torch.Tensor) -> None:
        version = self.slots.put(self.kind.fold(self.shape, flat).numpy())
        if version in self._published:  # a state that was opened goes on from a number that was served before
            self._order.remove(version)
        self._published[version] = flat.clone()
        self._order.append(version)
        while len(self._order) > 4:
            del self._published[self._order.popleft()]

    def _restart_from_served(self) -> None:
        config = self.config
        self._steps_before += self.learner.num_steps
        self.learner = Learner(
            self.shape, self.gate.served.flat, config["learning_rate"], config["depth"],
            config["rejected_weight"],
        )  # fmt: skip
        self._steps_at_publish = 0

    def _report(self) -> None:
        self.slots.report(
            num_steps=self._steps_before + self.learner.num_steps,
            train_s=self._train_s,
            lost_rows=self._lost,
            held_out_accept=self.gate.candidate_accept,
            served_accept=self.gate.served_accept,
            num_refused=self._refused,
            rejected_weight=self.learner.rejected_weight,
        )

    # Orders.

    def _save(self, order: dict[str, Any]) -> dict[str, Any]:
        path = Path(order["path"])
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".tmp")
        state = {
            **self.learner.state_dict(),
            "shape": shape_values(self.shape),
            "served": self.gate.served.flat.clone(),
            "version": self.slots.version,
            "steps_before": self._steps_before,
        }
        with open(unfinished, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        return {"path": str(path), "version": self.slots.version, "num_steps": self.learner.num_steps}

    def _open(self, order: dict[str, Any]) -> dict[str, Any]:
        state = torch.load(order["path"], map_location="cpu", weights_only=True)
        self.learner.load_state_dict({**state, "shape": shape_of(state["shape"])})
        self._steps_before = int(state.get("steps_before", 0))
        served = state["served"]
        self.gate.serve(served)
        self.slots.memory.words[0] = max(int(state["version"]) - 1, 0)  # versions go on where they were
        self._put(served)
        self._report()
        return {"version": self.slots.version, "num_steps": self.learner.num_steps}

    def _follow(self, order: dict[str, Any]) -> dict[str, Any]:
        """Learn from what the training ranks of a run leave on this node, too."""
        self.taps = TapRings(self.ring.layout, order["run"])
        return {}

    def _serve(self, order: dict[str, Any]) -> dict[str, Any]:
        """The engine went back to an earlier version: judge candidates by that one, and train on from it."""
        flat = self._published.get(order["version"])
        if flat is not None:
            self.gate.serve(flat)
            self._restart_from_served()
        return {"known": flat is not None}


def main() -> None:
    settings = json.loads(sys.argv[1])
    keeps = bool(settings["config"]["state"])
    end_with_parent(signal.SIGTERM if keeps else signal.SIGKILL)
    os.nice(settings["config"]["nice"])
    process = TrainerProcess(settings)
    for signum in (signal.SIGTERM, signal.SIGINT) if keeps else ():  # time to write the file
        signal.signal(signum, lambda *_: setattr(process, "ended", True))
    print(json.dumps({"ready": True}), flush=True)
    process.run()


if __name__ == "__main__":
    main()
