"""What `attach` returns: the state of quantized communication of one engine, its figures, and the way back.

A host's glue asks it two things at every collective (`quantize_gradients`, `quantize_weights`), wraps the collective in
`timed`, and tells it when an optimizer step ended. The first question of a step makes sure, by an all-reduce of three
numbers, that all ranks loaded the same state: another choice on another rank would leave both waiting for ever.
"""

from __future__ import annotations

import hashlib
import logging
import time
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from rl_accel.comm.bypass import Bypass
from rl_accel.comm.collectives import QuantizedCollectives
from rl_accel.comm.config import SDP4BitConfig
from rl_accel.comm.fingerprint import fingerprint
from rl_accel.comm.topology import Topology
from rl_accel.errors import CommError, NotLiveError

logger = logging.getLogger(__name__)


class CommHandle:
    """Quantized communication of one engine.

    Attributes:
        config: as given.
        collectives: the quantized collectives; its `traffic` counts bytes.
        host: what it is attached to, in words.
    """

    def __init__(self, topology: Topology, config: SDP4BitConfig, host: str, device: torch.device):
        self.config = config
        self.collectives = QuantizedCollectives(topology, config)
        self.host = host
        self.steps = 0
        self._device = device
        auto = config.bypass == "auto" and topology.world_size > 1
        self._bypass = {"gradients": Bypass(enabled=auto), "weights": Bypass(enabled=auto)}
        self._seconds = {"gradients": 0.0, "weights": 0.0}
        self._total_seconds = {"gradients": 0.0, "weights": 0.0}
        self._calls = {"gradients": 0, "weights": 0}
        self._calls_before = 0
        self._seen_steps = 0
        self._agreed = False
        """Whether the ranks have made sure, since the last step ended, that their choices are the same."""
        self._loaded: dict[str, Any] | None = None
        """A state to take up when all ranks have it."""
        self._on_load: list[Callable[[Any], None]] = []
        self._held_state: Callable[[], Any] | None = None
        self.wants_resync = False
        """Whether this rank asked for the next weights in full; its host's glue clears it when they were sent."""
        self._num_resyncs = 0
        self._waits: list[Callable[[], None]] = []
        self._undo: list[Callable[[], None]] = []
        self._weights: Callable[[], Iterable[torch.Tensor]] | None = None
        self._share = 0
        self._whole_weights: Callable[[], Iterator[tuple[str, torch.Tensor]]] | None = None

    @property
    def topology(self) -> Topology:
        return self.collectives.topology

    @property
    def attached(self) -> bool:
        return bool(self._undo)

    def quantize_gradients(self) -> bool:
        """Whether the next gradients go out quantized. Collective, once a step."""
        self._agree_once()
        return self._chosen("gradients", self.config.gradients)

    def quantize_weights(self) -> bool:
        """Whether the next weights go out as a quantized difference. Collective, once a step."""
        self._agree_once()
        return self._chosen("weights", self.config.weights)

    @property
    def weights_quantized(self) -> bool:
        """The choice for the next weights, as far as it is known before the ranks agree."""
        return self._chosen("weights", self.config.weights)

    def _agree_once(self) -> None:
        if not self._agreed:
            self.agree()

    def agree(self) -> bool:
        """Take up a loaded state, if all ranks loaded the same one. Collective; asked once a step by itself.

        Returns:
            whether some rank wants the weights in full.

        Raises:
            CommError: on every rank, if some loaded a state and others another one or none.
        """
        own = 0 if self._loaded is None else _key_of(self._loaded)
        largest, smallest, resync = own, own, self.wants_resync
        if self.topology.world_size > 1:
            numbers = torch.tensor([own, -own, int(resync)], dtype=torch.int64, device=self._device)
            dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.topology.group)
            largest, smallest, resync = numbers.tolist()
        if largest != -smallest and self.topology.world_size > 1:
            self._refuse_loaded(own)
        if self._loaded is not None:
            self._take_up(self._loaded)
            self._loaded = None
        self._agreed = True
        return bool(resync)

    def _refuse_loaded(self, own: int) -> NoReturn:
        keys: list[int] = [0] * self.topology.world_size
        dist.all_gather_object(keys, own, group=self.topology.group)
        missing = [rank for rank, key in enumerate(keys) if not key]
        names = "none on ranks " + ", ".join(map(str, missing)) if missing else f"different ones: {keys}"
        raise CommError(
            f"load_state_dict must be called with the same checkpoint on all ranks of {self.host}; there is {names}. "
            "Load it there too and go on"
        )

    def any_wants_resync(self) -> bool:
        """Whether some rank wants the weights in full; all wishes are granted then. Collective."""
        wish = torch.tensor([int(self.wants_resync)], device=self._device)
        self.wants_resync = False
        if self.topology.world_size > 1:
            dist.all_reduce(wish, dist.ReduceOp.MAX, group=self.topology.group)
        return bool(wish.item())

    def resync(self) -> None:
        """Send the next weights in full, on all ranks, whoever of them asks. Weights that are changed on the rank that
        owns them are noticed without it; it heals replicas that differ otherwise."""
        self.wants_resync = True

    def count_resync(self) -> None:
        """Tell that weights were sent in full because they had been written outside the optimizer's step."""
        if not self._num_resyncs:
            logger.info("weights of %s changed outside its optimizer: they are sent in full once", self.host)
        self._num_resyncs += 1

    def _chosen(self, what: str, wanted: bool) -> bool:
        live = wanted and self.topology.world_size > 1 and self.steps >= self.config.start_step
        return live and self._bypass[what].quantized

    def trying(self, what: str) -> bool:
        """Whether the time of this step decides something: nothing may go on beside it."""
        return self._bypass[what].trying

    @contextmanager
    def timed(self, what: str, calls: int = 1) -> Iterator[None]:
        """Count the seconds of a collective, `gradients` or `weights`; `calls` is 0 for what ends earlier calls.

        In steps whose time decides something the ranks meet first: the time that one waits for a slower one is not the
        link's. On an accelerator only these steps are timed, and wait for the device."""
        self._calls[what] += calls
        wait = self._device.type != "cpu"
        if self._bypass[what].trying:
            # A sum of nothing: what dist.barrier is, on the device that it may only guess.
            dist.all_reduce(torch.zeros(1, device=self._device), group=self.topology.group)
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
            NotLiveError: if gradients should have gone out quantized and none did, from the second step on, or only a
                part of them: the host reduces them elsewhere.
            CommError: if replicas were compared and differ.
        """
        if self.collectives.reduction.pending:
            raise NotLiveError(f"{self.host} ended a step while buckets of gradients waited for their reduction")
        none_came = self.collectives.reduction.calls == self._calls_before
        # The gradients of the first step may have been reduced before `attach`.
        if none_came and self._seen_steps and self._chosen("gradients", self.config.gradients):
            raise NotLiveError(f"4-bit gradients were asked for, and {self.host} reduced none through them in a step")
        self._seen_steps += 1
        self._calls_before = self.collectives.reduction.calls
        for what, bypass in self._bypass.items():
            if self.steps >= self.config.start_step and getattr(self.config, what):
                calls = self._calls[what]
                bypass.end_step(self._seconds[what] / calls if calls else None, self.topology.group, self._device)
            self._total_seconds[what] += self._seconds[what]
            self._seconds[what], self._calls[what] = 0.0, 0
        self.steps += 1
        self._agreed = False
        if self.config.check_every and self.steps % self.config.check_every == 0:
            self.check_replicas()

    def check_replicas(self) -> str:
        """Compare the weights that the ranks hold, by fingerprint; returns it. Collective.

        Raises:
            CommError: on every rank, if they differ; or if the host shards its weights, so that there are no replicas.
        """
        if self._weights is None:
            raise CommError(f"{self.host} holds no replicas of its weights to compare")
        self.wait()
        prints: list[tuple[int, str]] = [(0, "")] * self.topology.world_size
        own = self._share, f"{fingerprint(self._weights()):016x}"
        dist.all_gather_object(prints, own, group=self.topology.group)
        if len(set(prints)) > len({share for share, _ in prints}):
            shown = ", ".join(f"rank {rank} {text}" for rank, (_, text) in enumerate(prints))
            raise CommError(f"the ranks of {self.host} hold different weights after step {self.steps}: {shown}")
        return " ".join(text for _, text in sorted(set(prints)))

    def stats(self) -> dict[str, Any]:
        """Figures of this rank since `attach`.

        Returns:
            steps; `weight_resyncs`, times that weights went out in full because they were written outside the
            optimizer; bytes sent (`gradient_intra_bytes`, `gradient_inter_bytes`, `weight_intra_bytes`,
            `weight_inter_bytes`); seconds spent in the collectives (`gradients_s`, `weights_s`; on a GPU only of steps
            that were timed); for each of `gradients` and `weights`: `<what>_quantized`, the choice now, and once
            measured `<what>_quantized_s` and `<what>_plain_s`, seconds a call of the collective, and `<what>_advice`,
            in words.
        """
        traffic = asdict(self.collectives.traffic)
        figures: dict[str, Any] = {"steps": self.steps, "host": self.host, "world_size": self.topology.world_size}
        figures |= {"num_nodes": self.topology.num_nodes, "local_size": self.topology.local_size}
        figures["weight_resyncs"] = self._num_resyncs
        figures |= {name if name.endswith("values") else f"{name}_bytes": count for name, count in traffic.items()}
        for what, bypass in self._bypass.items():
            figures[f"{what}_s"] = self._total_seconds[what] + self._seconds[what]
            figures[f"{what}_quantized"] = self._chosen(what, getattr(self.config, what))
            gain = bypass.gain
            if gain is not None:
                figures[f"{what}_quantized_s"], figures[f"{what}_plain_s"] = bypass.quantized_s, bypass.plain_s
                verdict = (
                    f"quantized is {gain:.2f} times as fast"
                    if gain >= 1
                    else (f"the link is fast enough: plain is {1 / gain:.2f} times as fast, so it is used")
                )
                figures[f"{what}_advice"] = f"{what}: {verdict}"
        return figures

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on bit for bit: counters of the rounding noise, the choices made, and with
        secondary shards what the other nodes hold of this rank's."""
        if self._loaded is not None:
            return {**self._loaded, "config": asdict(self.config)}
        return {
            "config": asdict(self.config),
            "steps": self.steps,
            "calls": self.collectives.reduction.calls,
            "bypass": {what: bypass.state_dict() for what, bypass in self._bypass.items()},
            "held": self._held_state() if self._held_state is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint, after its weights were loaded and on all ranks; settings stay as attached.
        It counts from the next step on, whose first collective compares what the ranks loaded.

        Raises:
            CommError: if this is no state of a handle; nothing changes then.
        """
        try:
            whole = isinstance(state["steps"], int) and isinstance(state["calls"], int)
            for what in self._bypass:
                Bypass().load_state_dict(state["bypass"][what])
        except (KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise CommError("this is not a state that state_dict() of a handle of 4-bit communication gave")
        self._loaded = state
        for callback in self._on_load:
            callback(state.get("held"))

    def on_load(self, callback: Callable[[Any], None]) -> None:
        """Call when a state was loaded: the weights are then those that all ranks hold. The callback is given what
        `register_held` saved, None if nothing did."""
        self._on_load.append(callback)

    def register_held(self, save: Callable[[], Any]) -> None:
        """Tell what a checkpoint must have of the weights that the other ranks hold of this one's, where the host does
        not save them."""
        self._held_state = save

    def _take_up(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.collectives.reduction.calls = self._calls_before = state["calls"]
        for what, bypass in self._bypass.items():
            enabled = bypass.enabled
            bypass.load_state_dict({**state["bypass"][what], "enabled": enabled})
            if not enabled:
                bypass.quantized = True

    def replace(self, target: Any, name: str, method: Callable[..., Any]) -> None:
        """Put a method on an object, for as long as this handle is attached; what was on it is restored then."""
        before = vars(target).get(name)
        setattr(target, name, types.MethodType(method, target))

        def undo() -> None:
            if before is None:
                delattr(target, name)
            else:
                setattr(target, name, before)

        self.on_detach(undo)

    def on_wait(self, wait: Callable[[], None]) -> None:
        """Tell how to wait for weights that arrive while the host goes on."""
        self._waits.append(wait)

    def wait(self) -> None:
        """Wait until this rank holds all weights of the last step. Modules, their state dicts and the optimizer do so
        by themselves; who reads parameters directly with `overlap_weights` calls it before."""
        for wait in self._waits:
            wait()

    def on_detach(self, undo: Callable[[], None]) -> None:
        """Remember how to take back one change to the host."""
        self._undo.append(undo)

    def register_replicas(self, weights: Callable[[], Iterable[torch.Tensor]], share: int = 0) -> None:
        """Tell what every rank of the same `share` holds alike, for `check_replicas`."""
        self._weights, self._share = weights, share

    def register_whole_weights(self, weights: Callable[[], Iterator[tuple[str, torch.Tensor]]]) -> None:
        """Tell how to read whole weights where passes compute with others than the module's parameters."""
        self._whole_weights = weights

    def whole_weights(self) -> Iterator[tuple[str, torch.Tensor]] | None:
        """Return (name in the state dict, copy of the whole weight) of what passes over the model compute with, one
        unit after the other; all ranks run it to its end. None where the module's parameters are these weights."""
        return None if self._whole_weights is None or not self.attached else self._whole_weights()

    def detach(self) -> None:
        """Give the host its own communication back. Held weights stay; the next step sends them in full."""
        while self._undo:
            self._undo.pop()()


def _key_of(state: dict[str, Any]) -> int:
    """Return a positive number of 62 bits for what ranks must have in common of a state: not their own times."""
    bypass = {what: Bypass() for what in state["bypass"]}
    for what, saved in state["bypass"].items():
        bypass[what].load_state_dict(saved)
    shared = [state["steps"], state["calls"], sorted((what, choice.shared()) for what, choice in bypass.items())]
    return int.from_bytes(hashlib.sha256(repr(shared).encode()).digest()[:8], "little") >> 2 | 1
