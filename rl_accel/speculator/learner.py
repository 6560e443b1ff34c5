"""One training step of the draft head, and what a head is worth.

Loss, over chains begun at every position of a stretch, j the depth:

    sum_j GAMMA^j mean( (1 + lambda [rejected there]) * -sum_v p_v log q_v )

p is what the policy sampled from, so this is the forward KL divergence up to a constant; the text that chains follow is
what was accepted. lambda weighs the first rejected token of a draft that was served. It is learned: now and then the
head is trained twice from one state, with lambda and without, and the better one on held-out requests goes on.

Source: Aurora (forward KL on accepted tokens, extra weight for rejected ones), EAGLE-3 (training-time test, GAMMA);
differs: the weight has to show its use, since reports of it disagree (docs/speculator.md).

Shape suffixes: B stretches, S chain starts, V vocabulary.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch

from rl_accel.speculator.flat import FlatHead, FlatShape
from rl_accel.speculator.kinds import new_head
from rl_accel.speculator.replay import LENGTH, NONE, Batch
from rl_accel.speculator.traces import TOP_K, RowLayout

GAMMA = 0.8
WARM_UP = 20
MAX_NORM = 1.0
AVERAGE = 0.98
TRIAL_WEIGHT = 1.0
TRIAL_EVERY, TRIAL_STEPS = 400, 24
"""Training steps between two trials of lambda, and of a trial."""
TRIAL_MARGIN = 1.002
"""What lambda has to gain in accepted tokens a draft to be kept."""


class Learner:
    """Head, optimizer and lambda."""

    def __init__(self, shape: FlatShape, flat: torch.Tensor, lr: float, depth: int, rejected_weight: float = 0.0):
        self.head = new_head(shape)
        with torch.no_grad():
            self.head.flat.copy_(flat)
        self.average = flat.clone()
        """Running mean of the weights, which is what is served: it accepts 5 % more than the last weights do."""
        self.depth, self.lr = depth, lr
        self.learns_weight = rejected_weight < 0.0
        self.rejected_weight = max(rejected_weight, 0.0)
        self.num_steps = 0
        self._to_trial = TRIAL_EVERY
        self._optimizer = torch.optim.AdamW(
            self.head.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )

    @property
    def flat(self) -> torch.Tensor:
        return self.head.flat

    def step(self, batch: Batch) -> float:
        """Take one optimizer step; returns the loss. A loss that is not finite is left out."""
        loss = chain_loss(self.head, batch, self.depth, self.rejected_weight)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.head.parameters(), MAX_NORM)
        if torch.isfinite(norm):
            for group in self._optimizer.param_groups:
                group["lr"] = self.lr * min(1.0, (self.num_steps + 1) / WARM_UP)
            self._optimizer.step()
        self.num_steps += 1
        self._to_trial -= 1
        keep = min(AVERAGE, 1.0 - 1.0 / (1.0 + 0.2 * self.num_steps))
        self.average.lerp_(self.flat, 1.0 - keep)
        return float(loss.detach())

    @property
    def trial_is_due(self) -> bool:
        return self.learns_weight and self._to_trial <= 0

    def try_rejected_weight(self, batches: Callable[[], Batch | None], held_out: Batch) -> None:
        """Train on the same batches with lambda and without, and go on with what is better on `held_out`."""
        self._to_trial = TRIAL_EVERY
        start, outcomes = self._snapshot(), []
        drawn = [batch for batch in (batches() for _ in range(TRIAL_STEPS)) if batch is not None]
        for weight in (0.0, TRIAL_WEIGHT):
            self._restore(start)
            self.rejected_weight = weight
            for batch in drawn:
                self.step(batch)
            outcomes.append((expected_accept(self.head, held_out, self.depth), weight, self._snapshot()))
        plain, weighted = outcomes
        _, self.rejected_weight, end = weighted if weighted[0] > TRIAL_MARGIN * plain[0] else plain
        self._restore(end)
        self._to_trial = TRIAL_EVERY

    def state_dict(self) -> dict[str, Any]:
        return {
            "shape": self.head.shape,
            "flat": self.flat.clone(),
            "average": self.average.clone(),
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
            "num_steps": self.num_steps,
            "rejected_weight": self.rejected_weight,
            "to_trial": self._to_trial,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: if it is of a head of another shape, or not finite.
        """
        if state["shape"] != self.head.shape:
            raise ValueError(f"a head of another shape: {state['shape']} and not {self.head.shape}")
        if not (torch.isfinite(state["flat"]).all() and torch.isfinite(state["average"]).all()):
            raise ValueError("weights that are not finite")
        with torch.no_grad():
            self.head.flat.copy_(state["flat"])
        self.average.copy_(state["average"])
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.num_steps, self._to_trial = state["num_steps"], state["to_trial"]
        if self.learns_weight:
            self.rejected_weight = state["rejected_weight"]

    def _snapshot(self) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any], int]:
        return self.flat.clone(), self.average.clone(), copy.deepcopy(self._optimizer.state_dict()), self.num_steps

    def _restore(self, snapshot: tuple[torch.Tensor, torch.Tensor, dict[str, Any], int]) -> None:
        with torch.no_grad():
            self.head.flat.copy_(snapshot[0])
        self.average.copy_(snapshot[1])
        self._optimizer.load_state_dict(copy.deepcopy(snapshot[2]))
        self.num_steps = snapshot[3]


def chain_loss(head: FlatHead, batch: Batch, depth: int, rejected_weight: float = 0.0) -> torch.Tensor:
    """Return the loss of a batch, a scalar."""
    total = batch.aux_BTA.new_zeros(())
    for j, logits_BSV in enumerate(head.chain(batch.aux_BTA, batch.tokens_BTN, depth)):
        weight_BS = batch.counts(j).float()
        count = weight_BS.sum().clamp(min=1.0)
        if rejected_weight > 0.0:
            weight_BS = weight_BS * (1.0 + rejected_weight * (batch.rejected_BT[:, : weight_BS.shape[1]] == j))
        total = total + GAMMA**j * (weight_BS * batch.cross_entropy(logits_BSV, j, head.draft_ids)).sum() / count
    return total


def step_seconds(learner: Learner, layout: RowLayout, num_tokens: int) -> float:
    """Return the processor seconds of a training step with `num_tokens` positions, measured on made-up ones.

    `learner` is of no use afterwards.
    """
    length = min(LENGTH, num_tokens)
    size = max(num_tokens // length, 1), length
    batch = Batch(
        aux_BTA=torch.randn(*size, layout.num_features),
        tokens_BTN=torch.randint(0, layout.vocab_size, (*size, layout.num_tokens)),
        target_BTV=torch.full((*size, TOP_K), 1.0 / TOP_K),
        ids_BTk=torch.randint(0, layout.vocab_size, (*size, TOP_K)),
        valid_BT=torch.ones(size, dtype=torch.bool),
        rejected_BT=torch.full(size, NONE),
    )
    times = []
    for _ in range(5):
        started = time.process_time()
        learner.step(batch)
        times.append(time.process_time() - started)
    return min(times)


@torch.no_grad()
def expected_accept(head: FlatHead, batch: Batch, depth: int) -> float:
    """Return the accepted tokens that a greedy draft of `depth` tokens can expect, mean over positions.

    Along the text itself: the product, up to each depth, of the policy's probabilities of what the head would draft.
    """
    chains = head.chain(batch.aux_BTA, batch.tokens_BTN, depth)
    if not chains:
        return 0.0
    starts_BS = batch.counts(0)
    path_BS = starts_BS.float()
    total = torch.zeros(())
    for j, logits_BSV in enumerate(chains):
        num_starts, best_BS = logits_BSV.shape[1], logits_BSV.argmax(-1)
        tokens_BS = best_BS if head.draft_ids is None else head.draft_ids[best_BS]
        path_BS = path_BS[:, :num_starts] * batch.counts(j) * batch.probability(tokens_BS, j)
        total += path_BS.sum()
    return float(total / starts_BS.sum().clamp(min=1))
