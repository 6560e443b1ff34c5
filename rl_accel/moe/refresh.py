"""Compression of whatever weights arrive, again and again, for one engine.

A cold refresh is a function of the weights: an interrupted run that is resumed has the codes of one that was not. A
warm one begins at the compensators of the last refresh and takes one alternation; it is faster and depends on the
history, which is why its state belongs to a checkpoint. Everything is computed in float32, whatever the default dtype
is at a first load.

Source: ours. Memory: a warm refresher keeps codes and compensators of every tensor.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rl_accel.errors import MoEError
from rl_accel.moe import plan as plans
from rl_accel.moe import store
from rl_accel.moe.budget import TensorPlan
from rl_accel.moe.compress import Compressed, Method, compress
from rl_accel.moe.config import MoEConfig


@dataclass
class Tally:
    """What refreshes took since the last look."""

    seconds: float = 0.0
    tensors: int = 0
    errors: list[float] = field(default_factory=list)
    """Relative, mean over the matrices of a tensor."""
    alternations: list[float] = field(default_factory=list)


class Refresher:
    """Holds the plan, what may be reused, and the count of refreshes of every tensor."""

    def __init__(self, settings: MoEConfig):
        """
        Raises:
            MoEError: for a plan or routing counts that cannot be read.
        """
        self.settings = settings
        self.alternations = settings.alternations
        self.plan: dict[str, TensorPlan] = dict(plans.load(settings.plan)) if settings.plan else {}
        self._planned = bool(settings.plan)
        self._counts = plans.read_counts(settings.frequencies) if settings.frequencies else {}
        self.last: dict[str, Compressed] = {}
        self.versions: dict[str, int] = {}
        """Tensor -> how many sets of weights it has seen."""
        self.bytes: dict[str, tuple[int, int]] = {}
        """Tensor -> bytes of the packed form, weights."""
        self.tally = Tally()

    def plan_of(self, name: str, w_ENK: torch.Tensor) -> TensorPlan:
        """Return bits and ranks of a tensor, chosen when its first weights are seen if no plan has it.

        Raises:
            MoEError: if there is a plan and it lacks the tensor, or it has another number of matrices.
        """
        if name not in self.plan:
            if self._planned or self.settings.ranks == "budget":
                raise MoEError(
                    f"no bits and ranks for {name}: "
                    + (f"{self.settings.plan} lacks it" if self._planned else "ranks=budget needs a plan")
                    + "; make one with `python -m rl_accel.moe.plan`"
                )
            self.plan[name] = plans.of_tensor(self.settings, name, w_ENK, self._counts)
        found = self.plan[name]
        if len(found.ranks) != len(w_ENK):
            raise MoEError(f"the plan has {len(found.ranks)} ranks for {name}, which has {len(w_ENK)} matrices")
        return found

    def refresh(self, name: str, weight: torch.Tensor) -> Compressed:
        """Compress new weights of a tensor and count them.

        Args:
            weight: [E, N, K] or [N, K], any float dtype.
        """
        started = time.perf_counter()
        found = self._compress(name, weight, self.last.get(name))
        if self.settings.refresh == "warm":
            self.last[name] = found
        self.versions[name] = self.versions.get(name, 0) + 1
        self.bytes[name] = (found.memory_bytes(), weight.numel())
        self.tally.seconds += time.perf_counter() - started
        self.tally.tensors += 1
        self.tally.errors.append(float(found.errors_E.mean()))
        self.tally.alternations.append(float(found.alternations_E.double().mean()))
        return found

    def expected(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return what the engine should compute with after it was sent `weight`, of the shape and dtype of it."""
        last = self.last.get(name)
        found = self._compress(name, weight, None) if last is None else last
        return found.weight().reshape(weight.shape).to(weight.dtype)

    def _compress(self, name: str, weight: torch.Tensor, start: Compressed | None) -> Compressed:
        w_ENK = weight.detach().reshape(-1, *weight.shape[-2:]).float().contiguous()
        plan = self.plan_of(name, w_ENK)
        method = Method(base=self.settings.base, alternations=self.alternations if start is None else 1)
        return compress(w_ENK, plan.bits, self.settings.group_size, plan.ranks, method, start)

    def check_version(self, version: int) -> None:
        """Raise MoEError unless every tensor was refreshed `version` times."""
        stale = [name for name, seen in self.versions.items() if seen != version]
        if stale:
            raise MoEError(
                f"{stale[0]} and {len(stale) - 1} other tensors hold experts of other weights than the last "
                f"({self.versions[stale[0]]} of {version} refreshes)"
            )

    def bits_per_weight(self) -> float:
        """Return bits of a weight with everything that belongs to it, in the packed form."""
        sizes = list(self.bytes.values())
        return 8 * sum(size for size, _ in sizes) / max(sum(count for _, count in sizes), 1)

    def forget(self) -> None:
        """Begin anew: the next refresh is a cold one."""
        self.last.clear()
        self.tally = Tally()

    def drain(self) -> Tally:
        """Return what refreshes took since the last call."""
        tally, self.tally = self.tally, Tally()
        return tally

    def save(self, file: Path) -> None:
        """Write what a warm refresh goes on from."""
        store.save(self.last, file, max(self.versions.values(), default=0))

    def restore(self, file: Path) -> None:
        """Read it; used by the next refresh."""
        self.last = store.load(file)

    def local(self, name: str, experts: Mapping[int, int]) -> None:
        """Keep the ranks of the experts that live here: number in the model -> position here."""
        if name in self.plan and len(self.plan[name].ranks) != len(experts):
            ranks = self.plan[name].ranks
            here = sorted(experts, key=experts.__getitem__)
            self.plan[name] = TensorPlan(self.plan[name].bits, tuple(ranks[expert] for expert in here))
