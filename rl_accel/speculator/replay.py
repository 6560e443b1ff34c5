"""What the trainer learns from: recent traces, kept by request, and batches of stretches of them.

Rows older than `capacity` go, and those of a policy more than `max_policy_lag` weight syncs ago. One request in
`HELD_OUT` is never learned from: candidates are judged on it (`gate.py`). Newer requests are taken more often.

Shape suffixes: B stretches, T positions, A hidden states, N tokens of a row, V vocabulary, k kept entries.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from rl_accel.speculator.traces import VECTORS, RowLayout

HELD_OUT = 12
"""One request in so many."""
MIN_KNOWN, MIN_HELD_OUT = 4, 2
"""Requests that a batch is taken from at least: to learn, and to judge the first versions soon."""
LENGTH = 64
"""Positions of a stretch, at most."""
NEWEST = 0.25
"""Share of the requests that half of a batch is taken from."""
MIN_TEMPERATURE = 0.2
"""Greedy requests are learned from as if they sampled at this temperature."""
NONE = -1


@dataclass
class Batch:
    """Stretches of responses, padded behind."""

    aux_BTA: torch.Tensor
    tokens_BTN: torch.Tensor
    target_BTV: torch.Tensor
    """Probabilities, [B, T, V] or of the kept entries [B, T, k], which sum to 1."""
    ids_BTk: torch.Tensor | None
    """Which entries those are; None: all."""
    valid_BT: torch.Tensor
    rejected_BT: torch.Tensor
    """Depth at which the draft that was begun here was rejected; -1: it was not, or there was none."""

    def cross_entropy(
        self, logits_BSV: torch.Tensor, depth: int, draft_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return -sum p log q, [B, S], of logits for chains of this depth.

        Args:
            draft_ids: the token of each logit, int64, ascending; None: all. What the policy thinks of others is left
                out, so that a position counts as much as tokens that can be drafted are likely there.
        """
        first = 1 + depth
        target = self.target_BTV[:, first:]
        log_q = logits_BSV.log_softmax(-1)
        if self.ids_BTk is None:
            return -((target if draft_ids is None else target[..., draft_ids]) * log_q).sum(-1)
        ids = self.ids_BTk[:, first:]
        if draft_ids is not None:
            where = torch.searchsorted(draft_ids, ids.contiguous()).clamp(max=len(draft_ids) - 1)
            target, ids = target * (draft_ids[where] == ids), where
        return -(target * log_q.gather(-1, ids)).sum(-1)

    def probability(self, tokens_BS: torch.Tensor, depth: int) -> torch.Tensor:
        """Return the policy's probability of tokens, [B, S], drafted at this depth."""
        target = self.target_BTV[:, 1 + depth :]
        if self.ids_BTk is None:
            return target.gather(-1, tokens_BS[..., None])[..., 0]
        return (target * (self.ids_BTk[:, 1 + depth :] == tokens_BS[..., None])).sum(-1)

    def counts(self, depth: int) -> torch.Tensor:
        """Return whether both ends of a chain of this depth are there, bool [B, S]."""
        num_starts = self.valid_BT.shape[1] - 1 - depth
        return self.valid_BT[:, :num_starts] & self.valid_BT[:, 1 + depth :]


@dataclass
class _Request:
    serials: array = field(default_factory=lambda: array("q"))
    position: int = NONE
    policy: int = 0


class Replay:
    """Rows in the order of arrival, and which of them belong to which request."""

    def __init__(self, layout: RowLayout, capacity: int, max_policy_lag: int = 2, seed: int = 0):
        self.layout, self.capacity, self.max_policy_lag = layout, capacity, max_policy_lag
        self._rng = np.random.default_rng(seed)
        self._fields = {
            name: np.zeros((capacity, count) if name in VECTORS else capacity, dtype)
            for name, (dtype, count) in layout.fields().items()
            if name not in ("request", "position", "policy", "draft")
        }
        self._requests: dict[int, _Request] = {}
        self._stale: set[int] = set()
        self.num_rows = 0
        """Rows taken since the start."""
        self.policy = 0

    def __len__(self) -> int:
        """Rows that are held."""
        return min(self.num_rows, self.capacity)

    def add(self, rows: Mapping[str, npt.NDArray]) -> None:
        """Take rows in the order in which they were made."""
        requests, positions = rows["request"], rows["position"]
        if not len(requests):
            return
        slots = np.arange(self.num_rows, self.num_rows + len(requests)) % self.capacity
        for name, values in self._fields.items():
            values[slots] = rows[name]
        self.policy = max(self.policy, int(rows["policy"].max()))
        # Runs of one request at adjacent positions: a step of the engine leaves one per request.
        breaks = np.flatnonzero((np.diff(requests) != 0) | (np.diff(positions) != 1)) + 1
        for start, end in zip([0, *breaks.tolist()], [*breaks.tolist(), len(requests)], strict=True):
            self._extend(
                int(requests[start]), int(positions[start]), int(rows["policy"][start]), self.num_rows + start,
                end - start,
            )  # fmt: skip
        self.num_rows += len(requests)
        self._forget()

    def sample(self, num_tokens: int, held_out: bool = False) -> Batch | None:
        """Return a batch of about `num_tokens` positions, or None while there is too little."""
        oldest = self.num_rows - self.capacity
        known = [
            r.serials for name, r in self._requests.items()
            if (is_held_out(name) == held_out) and len(r.serials) > 2 and r.policy >= self.policy - self.max_policy_lag
        ]  # fmt: skip
        if len(known) < (MIN_HELD_OUT if held_out else MIN_KNOWN):
            return None
        lengths = np.array([min(len(serials), LENGTH) for serials in known])
        num_newest = max(int(len(known) * NEWEST), 1)
        stretches: list[npt.NDArray[np.int64]] = []
        total = 0
        while total < num_tokens:
            newest = bool(self._rng.integers(2))
            first = len(known) - num_newest if newest else 0
            weights = lengths[first:]
            count = max((num_tokens - total) // LENGTH, 1)
            for i in self._rng.choice(len(weights), count, p=weights / weights.sum()):
                serials = known[first + i]
                start = int(self._rng.integers(max(len(serials) - LENGTH, 0) + 1))
                stretch = np.array(serials[start : start + LENGTH], np.int64)
                stretch = stretch[stretch >= oldest]
                if len(stretch) > 2:
                    stretches.append(stretch)
                total += max(len(stretch), 1)
        return self._batch(stretches) if stretches else None

    def knows(self, request: int) -> bool:
        """Whether rows of a request are held."""
        return request in self._requests

    def memory_bytes(self) -> int:
        return sum(field.nbytes for field in self._fields.values())

    def _extend(self, name: int, position: int, policy: int, serial: int, count: int) -> None:
        request = self._requests.get(name)
        if request is None or request.position != position:
            # New, or rows were lost in between: what was before is of no use to a chain.
            self._requests.pop(name, None)
            request = self._requests[name] = _Request(policy=policy)
        request.serials.extend(range(serial, serial + count))
        request.position = position + count

    def _forget(self) -> None:
        oldest = self.num_rows - self.capacity
        gone = []
        for name, request in self._requests.items():  # in the order of their first rows
            if request.serials[-1] >= oldest and request.policy >= self.policy - self.max_policy_lag:
                break
            gone.append(name)
        for name in gone:
            del self._requests[name]

    def _batch(self, stretches: list[npt.NDArray[np.int64]]) -> Batch:
        length = max(map(len, stretches))
        valid = np.zeros((len(stretches), length), bool)
        slots = np.zeros((len(stretches), length), np.int64)
        for i, stretch in enumerate(stretches):
            valid[i, : len(stretch)] = True
            slots[i, : len(stretch)] = stretch % self.capacity
        values = {name: torch.from_numpy(field[slots]) for name, field in self._fields.items()}
        temperature = values["temperature"].float().clamp(min=MIN_TEMPERATURE)
        target = (values["target"].float() / temperature[..., None]).softmax(-1)
        # A draft's outcome stands on its first row; it was begun on the row before.
        accepted, drafted = values["accepted"].long(), values["drafted"].long()
        outcome = torch.where(drafted > accepted, accepted, torch.full_like(accepted, NONE))
        return Batch(
            aux_BTA=values["aux"].float(),
            tokens_BTN=values["tokens"].long(),
            target_BTV=target,
            ids_BTk=values["target_ids"].long() if "target_ids" in values else None,
            valid_BT=torch.from_numpy(valid),
            rejected_BT=F.pad(outcome[:, 1:], (0, 1), value=NONE),
        )


def is_held_out(request: int) -> bool:
    """Whether a request is kept for judging; requests are hashes, so any bits do."""
    return (request >> 8) % HELD_OUT == 0
