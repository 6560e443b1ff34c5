"""How a trained head reaches the engine: two slots of shared memory, written in turn.

The trainer writes the slot that is not current and then flips; the engine sees one number change, copies, and checks
that the copy is whole, of the right shape, and finite. Nothing waits for anything.

Header words: version, slot, shape, checksum of each slot, and what the trainer says of itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rl_accel.speculator.shared import SharedBytes

VERSION, SLOT, SHAPE, CHECKSUMS = 0, 1, 2, 3  # checksums: two words
REPORT = 5
"""First word of the trainer's report."""
STEPS, TRAIN_US, LOST_ROWS, HELD_OUT_E6, SERVED_E6, REFUSED, REJECTED_E3, BUSY = range(REPORT, REPORT + 8)
ALLOWED_E3 = REPORT + 8
"""Written by the engine: share of the time, in thousandths, that the trainer may train."""
PAUSED = REPORT + 9
"""Written by the engine: whether its steps need all cores at present."""
FROM_RANKS, STEP_US = PAUSED + 1, PAUSED + 2
"""Of the trainer's report as well."""


@dataclass(frozen=True)
class Report:
    """What the trainer says of itself."""

    num_steps: int
    train_s: float
    """Its processor time in training steps."""
    lost_rows: int
    held_out_accept: float
    """Accepted tokens a draft that the present head would have on rollouts that it does not learn from."""
    served_accept: float
    """The same of the version that is served."""
    num_refused: int
    """Candidates that the gate refused."""
    rejected_weight: float
    busy: bool
    """Whether a training step is running now."""
    rank_rows: int
    """Rows that came from training ranks (`tap_rings.py`)."""
    train_step_s: float
    """Processor time of a training step; 0.0 before it was measured."""


class WeightSlots:
    """Folded weights of one head (`served.fold`), `num_weights` float32 numbers a slot."""

    def __init__(self, num_weights: int, fingerprint: int, descriptor: int | None = None):
        made = descriptor is None
        self.memory = SharedBytes(2 * 4 * num_weights, "rl_accel-head", descriptor)
        self.fingerprint = fingerprint
        self._slots: npt.NDArray[np.float32] = self.memory.data.view(np.float32).reshape(2, num_weights)
        if made:
            self.memory.words[SHAPE] = fingerprint
            self.memory.words[ALLOWED_E3] = 1000

    @property
    def version(self) -> int:
        return int(self.memory.words[VERSION])

    def put(self, flat: npt.NDArray[np.float32]) -> int:
        """Write the next version; returns its number."""
        slot = 1 - int(self.memory.words[SLOT])
        self._slots[slot] = flat
        self.memory.words[CHECKSUMS + slot] = _checksum(self._slots[slot])
        self.memory.words[SLOT] = slot
        self.memory.words[VERSION] += 1
        return self.version

    def get(self) -> tuple[int, npt.NDArray[np.float32] | None, str]:
        """Return the current version, a copy of its weights, and "" or why they must not be served (then None).

        A copy that the trainer has overwritten meanwhile is refused too; the next call gets the newer one.
        """
        words = self.memory.words
        version, slot = self.version, int(words[SLOT])
        if int(words[SHAPE]) != self.fingerprint:
            return version, None, "they are of a head of another shape"
        flat = self._slots[slot].copy()
        if _checksum(flat) != int(words[CHECKSUMS + slot]):
            return version, None, "they are damaged, or were overwritten while they were read"
        if not np.isfinite(flat.sum()):  # one number that is not finite makes the sum so
            return version, None, "they are not finite"
        return version, flat, ""

    def report(self, **values: float) -> None:
        """Note what the trainer says of itself, by the fields of `Report`."""
        words, scales = self.memory.words, _SCALES
        for name, value in values.items():
            where, scale = scales[name]
            words[where] = round(value * scale)

    def read_report(self) -> Report:
        words = self.memory.words
        found = {name: int(words[where]) / scale for name, (where, scale) in _SCALES.items()}
        whole = {name: int(found[name]) for name in ("num_steps", "lost_rows", "num_refused", "rank_rows")}
        return Report(**{**found, **whole, "busy": bool(found["busy"])})  # type: ignore[arg-type]

    @property
    def busy(self) -> bool:
        """Whether the trainer is training."""
        return bool(self.memory.words[BUSY])

    @property
    def train_step_s(self) -> float:
        """As in the report."""
        return int(self.memory.words[STEP_US]) / 1e6

    @property
    def allowed_share(self) -> float:
        return int(self.memory.words[ALLOWED_E3]) / 1000

    @allowed_share.setter
    def allowed_share(self, share: float) -> None:
        self.memory.words[ALLOWED_E3] = round(1000 * min(max(share, 0.0), 1.0))

    @property
    def paused(self) -> bool:
        return bool(self.memory.words[PAUSED])

    @paused.setter
    def paused(self, value: bool) -> None:
        self.memory.words[PAUSED] = value


def _checksum(flat: npt.NDArray[np.float32]) -> np.int64:
    return flat.view(np.uint32).sum(dtype=np.int64)


_SCALES = {
    "num_steps": (STEPS, 1),
    "train_s": (TRAIN_US, 1e6),
    "lost_rows": (LOST_ROWS, 1),
    "held_out_accept": (HELD_OUT_E6, 1e6),
    "served_accept": (SERVED_E6, 1e6),
    "num_refused": (REFUSED, 1),
    "rejected_weight": (REJECTED_E3, 1e3),
    "busy": (BUSY, 1),
    "rank_rows": (FROM_RANKS, 1),
    "train_step_s": (STEP_US, 1e6),
}
