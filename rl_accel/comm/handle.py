"""What `attach` returns: the state of quantised communication of one engine, its figures, and the way back.

A host's glue asks it two things at every collective (`quantise_gradients`, `quantise_weights`), wraps the collective in
`timed`, and tells it when an optimizer step ended. The first question of a step makes sure, by an all-reduce of three
numbers, that all ranks loaded the same state: another choice on another rank would leave both waiting for ever.
"""

from __future__ import annotations

import hashlib
import time
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from rl_accel.comm.bypass import Bypass
from rl_accel.comm.collectives import QuantisedCollectives
from rl_accel.comm.config import SDP4BitConfig
from rl_accel.comm.topology import Topology
from rl_accel.errors import CommError, NotLiveError


class Handle:
    """Quantised communication of one engine.

    Attributes:
        config: as given.
        collectives: the quantised collectives; its `traffic` counts bytes.
        host: what it is attached to, in words.
    """

    def __init__(self, topology: Topology, config: SDP4BitConfig, host: str, device: torch.device):
        self.config = config
        self.collectives = QuantisedCollectives(topology, config)
        self.host = host
        self.steps = 0
        self._device = device
        auto = config.bypass == "auto" and topology.world_size > 1
        self._bypass = {"gradients": Bypass(enabled=auto), "weights": Bypass(enabled=auto)}
        self._seconds = {"gradients": 0.0, "weights": 0.0}
        self._total_seconds = {"gradients": 0.0, "weights": 0.0}
        self._calls = {"gradients": 0, "weights": 0}
        self._calls_before = 0
        self._undo: list[Callable[[], None]] = []
        self._weights: Callable[[], Iterable[torch.Tensor]] | None = None

    @property
    def topology(self) -> Topology:
        return self.collectives.topology

    @property
    def attached(self) -> bool:
        return bool(self._undo)

    def quantise_gradients(self) -> bool:
        """Whether the next gradients go out quantised."""
        return self._chosen("gradients", self.config.gradients)

    def quantise_weights(self) -> bool:
        """Whether the next weights go out as a quantised difference."""
        return self._chosen("weights", self.config.weights)

    def _chosen(self, what: str, wanted: bool) -> bool:
        live = wanted and self.topology.world_size > 1 and self.steps >= self.config.start_step
        return live and self._bypass[what].quantised

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count the seconds of a collective, `gradients` or `weights`. In steps whose time decides something the ranks
        meet first: the time that one waits for a slower one is not the link's. On an accelerator only these steps are
        timed, and wait for the device."""
        self._calls[what] += 1
        wait = self._device.type != "cpu"
        if self._bypass[what].trying:
            dist.barrier(group=self.topology.group)
        elif wait:
            yield
            return
        if wait:
            torch.accelerator.synchronize(self._device)
        start = time.perf_counter()
        yield
        if wait:
            torch.accelerator.synchronize(self._device)
        self._seconds[what] += time.perf_counter() - start

    def end_step(self) -> None:
        """Tell that an optimizer step ended. Collective in steps that decide or check.

        Raises:
            NotLiveError: if gradients should have gone out quantised and none did: the host reduces them elsewhere.
            CommError: if replicas were compared and differ.
        """
        if self.quantise_gradients() and self.collectives.calls == self._calls_before:
            raise NotLiveError(f"4-bit gradients were asked for, and {self.host} reduced none through them in a step")
        self._calls_before = self.collectives.calls
        for what, bypass in self._bypass.items():
            if self.steps >= self.config.start_step and getattr(self.config, what):
                calls = self._calls[what]
                bypass.end_step(self._seconds[what] / calls if calls else None, self.topology.group, self._device)
            self._total_seconds[what] += self._seconds[what]
            self._seconds[what], self._calls[what] = 0.0, 0
        self.steps += 1
        if self.config.check_every and self.steps % self.config.check_every == 0:
            self.check_replicas()

    def check_replicas(self) -> str:
        """Compare the weights that the ranks hold, by SHA-256; returns the digest. Collective.

        Raises:
            CommError: on every rank, if they differ; or if the host shards its weights, so that there are no replicas.
        """
        if self._weights is None:
            raise CommError(f"{self.host} holds no replicas of its weights to compare")
        digest = hashlib.sha256()
        for weights in self._weights():
            digest.update(weights.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        digests: list[str] = [""] * self.topology.world_size
        dist.all_gather_object(digests, digest.hexdigest(), group=self.topology.group)
        if len(set(digests)) > 1:
            shown = ", ".join(f"rank {rank} {text[:12]}" for rank, text in enumerate(digests))
            raise CommError(f"the ranks of {self.host} hold different weights after step {self.steps}: {shown}")
        return digests[0]

    def stats(self) -> dict[str, Any]:
        """Figures of this rank since `attach`.

        Returns:
            steps; bytes sent (`gradient_intra_bytes`, `gradient_inter_bytes`, `weight_intra_bytes`,
            `weight_inter_bytes`); seconds spent in the collectives (`gradients_s`, `weights_s`; on a GPU only of steps
            that were timed); for each of `gradients` and `weights`: `<what>_quantised`, the choice now, and once
            measured `<what>_quantised_s` and `<what>_plain_s`, seconds a call of the collective, and `<what>_advice`,
            in words.
        """
        traffic = asdict(self.collectives.traffic)
        figures: dict[str, Any] = {"steps": self.steps, "host": self.host, "world_size": self.topology.world_size}
        figures |= {"num_nodes": self.topology.num_nodes, "local_size": self.topology.local_size}
        figures |= {name if name.endswith("values") else f"{name}_bytes": count for name, count in traffic.items()}
        for what, bypass in self._bypass.items():
            figures[f"{what}_s"] = self._total_seconds[what] + self._seconds[what]
            figures[f"{what}_quantised"] = self._chosen(what, getattr(self.config, what))
            gain = bypass.gain
            if gain is not None:
                figures[f"{what}_quantised_s"], figures[f"{what}_plain_s"] = bypass.quantised_s, bypass.plain_s
                verdict = (
                    f"quantised is {gain:.2f} times as fast"
                    if gain >= 1
                    else (f"the link is fast enough: plain is {1 / gain:.2f} times as fast, so it is used")
                )
                figures[f"{what}_advice"] = f"{what}: {verdict}"
        return figures

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on bit for bit: counters of the rounding noise and the choices made."""
        return {
            "config": asdict(self.config),
            "steps": self.steps,
            "calls": self.collectives.calls,
            "bypass": {what: bypass.state_dict() for what, bypass in self._bypass.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint; settings stay as attached."""
        self.steps = state["steps"]
        self.collectives.calls = self._calls_before = state["calls"]
        for what, saved in state["bypass"].items():
            enabled = self._bypass[what].enabled
            self._bypass[what].load_state_dict({**saved, "enabled": enabled})
            if not enabled:
                self._bypass[what].quantised = True

    def replace(self, target: Any, name: str, method: Callable[..., Any]) -> None:
        """Put a method on an object, for as long as this handle is attached; whatever was on it comes back then."""
        before = vars(target).get(name)
        setattr(target, name, types.MethodType(method, target))

        def undo() -> None:
            if before is None:
                delattr(target, name)
            else:
                setattr(target, name, before)

        self.on_detach(undo)

    def on_detach(self, undo: Callable[[], None]) -> None:
        """Remember how to take back one change to the host."""
        self._undo.append(undo)

    def holds(self, weights: Callable[[], Iterable[torch.Tensor]]) -> None:
        """Tell what every rank holds alike, for `check_replicas`."""
        self._weights = weights

    def detach(self) -> None:
        """Give the host its own communication back. Held weights stay; the next step sends them in full."""
        while self._undo:
            self._undo.pop()()
