"""Replay, loss, gate, pace, watch and ledger: what is learned from, how, and what follows from how well it goes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rl_accel.speculator.gate import SwapGate
from rl_accel.speculator.head import DraftHead, first_weights
from rl_accel.speculator.learner import GAMMA, Learner, chain_loss, expected_accept
from rl_accel.speculator.ledger import MIN_STEPS, PAYBACK_STEPS, PERIOD_S, RETRY_S, RETRY_SHARE, SMALLEST, Ledger
from rl_accel.speculator.pace import STEADY_SHARE, Pace
from rl_accel.speculator.replay import Replay, is_held_out
from rl_accel.speculator.traces import RowLayout
from rl_accel.speculator.watch import MIN_DRAFTS, ServedWatch

from .world import LAYOUT, SHAPE, rows_of


def replay_of(rows, capacity: int = 4096, lag: int = 2, layout: RowLayout = LAYOUT) -> Replay:
    replay = Replay(layout, capacity, lag, seed=1)
    replay.add(rows)
    return replay


def split(rows, size: int):
    """The same rows as steps of an engine bring them: a few of each request at a time."""
    order = np.lexsort((np.arange(len(rows["request"])), rows["position"] // size))
    return {name: values[order] for name, values in rows.items()}


def test_stretches_are_adjacent_positions_of_one_request() -> None:
    """Rows arrive interleaved; a stretch has the text of one request in order."""
    rows = rows_of(40, 30)
    rows["temperature"] = rows["position"].astype(np.float16)  # to be told from the batch
    batch = replay_of(split(rows, 3)).sample(2000)
    for b in range(len(batch.valid_BT)):
        length = int(batch.valid_BT[b].sum())
        tokens = batch.tokens_BTN[b, :length]
        assert torch.equal(tokens[1:, 1:], tokens[:-1, :-1]), "each row's older tokens are the row's before"


def test_a_gap_begins_anew_and_the_oldest_rows_go() -> None:
    rows = rows_of(8, 20)
    kept = (rows["position"] < 8) | (rows["position"] >= 12)
    replay = replay_of({name: values[kept] for name, values in rows.items()})
    assert all(len(r.serials) == 11 for r in replay._requests.values())
    small = replay_of(rows_of(8, 20), capacity=64)
    small.add(rows_of(8, 20, first=8))
    assert len(small) == 64
    oldest = small.num_rows - 64
    for request in small._requests.values():
        assert request.serials[-1] >= oldest


def test_traces_of_older_policies_are_dropped() -> None:
    replay = replay_of(rows_of(20, 12, policy=0), lag=2)
    assert replay.sample(200) is not None
    replay.add(rows_of(20, 12, first=100, policy=3))
    assert {r.policy for r in replay._requests.values()} == {3}


def test_held_out_requests_are_not_learned_from() -> None:
    rows = rows_of(200, 10)
    held = {int(request) for request in rows["request"] if is_held_out(int(request))}
    assert 4 < len(held) < 40
    replay = replay_of(rows)
    aux_of_held = {tuple(a.tolist()) for a, r in zip(rows["tokens"], rows["request"], strict=True) if int(r) in held}
    learned = replay.sample(4000)
    texts = {tuple(t.tolist()) for t in learned.tokens_BTN[learned.valid_BT]}
    only_held = aux_of_held - {
        tuple(a.tolist()) for a, r in zip(rows["tokens"], rows["request"], strict=True) if int(r) not in held
    }
    assert only_held and not texts & only_held
    judged = replay.sample(4000, held_out=True)
    assert {tuple(t.tolist()) for t in judged.tokens_BTN[judged.valid_BT]} <= aux_of_held


@pytest.mark.parametrize("vocab_size", [SHAPE.vocab_size, 5000])
def test_loss_equals_one_chain_after_the_other(vocab_size: int) -> None:
    """Also with a large vocabulary, of which 64 entries are kept, and with weight on rejected tokens."""
    from dataclasses import replace

    layout = RowLayout(LAYOUT.num_features, LAYOUT.num_tokens, vocab_size)
    shape = replace(SHAPE, vocab_size=vocab_size)
    rows = rows_of(12, 9, layout=layout)
    rows["drafted"][::4], rows["accepted"][::4] = 3, 1
    batch = replay_of(rows, layout=layout).sample(60)
    assert (batch.rejected_BT >= 0).any()
    head = DraftHead(shape)
    with torch.no_grad():
        head.flat.copy_(first_weights(shape, 2))
    depth, weight = 3, 1.5
    chains = head.chain(batch.aux_BTA, batch.tokens_BTN, depth)
    total = 0.0
    for j in range(depth):
        losses = []
        for b in range(batch.valid_BT.shape[0]):
            for t in range(batch.valid_BT.shape[1] - 1 - j):
                if batch.valid_BT[b, t] and batch.valid_BT[b, t + 1 + j]:
                    log_q = chains[j][b, t].log_softmax(-1)
                    ids = slice(None) if batch.ids_BTk is None else batch.ids_BTk[b, t + 1 + j]
                    loss = -(batch.target_BTV[b, t + 1 + j] * log_q[ids]).sum()
                    losses.append(loss * (1.0 + weight * (int(batch.rejected_BT[b, t]) == j)))
        total += GAMMA**j * torch.stack(losses).sum() / len(losses)
    torch.testing.assert_close(chain_loss(head, batch, depth, weight), total, rtol=1e-4, atol=1e-5)


def test_a_rejection_stands_on_the_row_where_its_draft_began() -> None:
    """The draft verified at positions 4 to 6 was begun on the row before; its second token was rejected."""
    rows = rows_of(30, 10)
    where = rows["position"] == LAYOUT.num_tokens + 4
    rows["drafted"][where], rows["accepted"][where] = 3, 1
    batch = replay_of(rows).sample(300)
    marked = batch.rejected_BT[batch.valid_BT.sum(1) == 10]
    assert (marked[:, 3] == 1).all() and (marked[:, [0, 1, 2, 4, 5]] == -1).all()


def learned(rejected_weight: float = 0.0, steps: int = 150):
    replay = replay_of(split(rows_of(150, 24), 2), capacity=8192)
    learner = Learner(SHAPE, first_weights(SHAPE, 0), 8e-3, 3, rejected_weight)
    for _ in range(steps):
        learner.step(replay.sample(256))
    return learner, replay


def test_the_head_learns_the_policy() -> None:
    learner, replay = learned()
    held_out = replay.sample(1000, held_out=True)
    fresh = DraftHead(SHAPE)
    with torch.no_grad():
        fresh.flat.copy_(first_weights(SHAPE, 0))
    before = expected_accept(fresh, held_out, 3)
    with torch.no_grad():
        fresh.flat.copy_(learner.average)
    assert expected_accept(fresh, held_out, 3) > 5 * before and expected_accept(fresh, held_out, 3) > 0.5


def test_a_batch_that_is_not_finite_changes_nothing() -> None:
    learner, replay = learned(steps=3)
    before, batch = learner.flat.clone(), replay.sample(256)
    batch.aux_BTA[0, 0] = float("nan")
    learner.step(batch)
    assert torch.equal(learner.flat, before)


def test_a_restored_learner_goes_on_identically() -> None:
    learner, replay = learned(steps=20)
    batches = [replay.sample(256) for _ in range(5)]
    state = {**learner.state_dict()}
    other = Learner(SHAPE, first_weights(SHAPE, 7), 8e-3, 3)
    other.load_state_dict(state)
    for batch in batches:
        learner.step(batch)
        other.step(batch)
    assert torch.equal(learner.flat, other.flat) and torch.equal(learner.average, other.average)
    state["flat"] = torch.full_like(state["flat"], float("nan"))
    with pytest.raises(ValueError, match="finite"):
        other.load_state_dict(state)


def test_the_weight_of_rejections_has_to_show_its_use() -> None:
    """Both trials train from one state; what goes on is the better one, and its weight."""
    learner, replay = learned(rejected_weight=-1.0, steps=10)
    assert learner.learns_weight and learner.rejected_weight == 0.0
    held_out = replay.sample(600, held_out=True)
    steps = learner.num_steps
    learner.try_rejected_weight(lambda: replay.sample(256), held_out)
    assert learner.rejected_weight in (0.0, 1.0) and learner.num_steps > steps
    assert not learner.trial_is_due


@pytest.mark.parametrize("poison", ["nan", "random", "shape"])
def test_the_gate_lets_no_poison_through(poison: str) -> None:
    learner, replay = learned()
    held_out, served = replay.sample(1000, held_out=True), DraftHead(SHAPE)
    gate = SwapGate(served, 3)
    assert gate.admit(learner.average.clone(), held_out) == ""
    kept = gate.served.flat.clone()
    bad = {
        "nan": torch.full_like(kept, float("nan")),
        "random": torch.randn_like(kept),
        "shape": torch.cat([kept, kept]),
    }[poison]
    assert gate.admit(bad, held_out) != ""
    assert torch.equal(gate.served.flat, kept)


def test_training_rests_when_the_head_gets_no_better_and_begins_anew_when_it_falls_behind() -> None:
    pace = Pace()
    for t in range(0, 20, 2):
        pace.observe(float(t), 1.0 + 0.2 * t, 1.0 + 0.2 * t)
    assert pace.share == 1.0
    for t in range(20, 40, 2):
        pace.observe(float(t), 5.0, 5.0)
    assert pace.share == STEADY_SHARE
    pace.observe(40.0, 3.0, 3.0)
    assert pace.share == 1.0


def drafts_of(num_drafts: int, promised: float, kept: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Drafts of four tokens with `promised` and `kept` accepted tokens each, on average."""
    paths = np.full((num_drafts, 4), promised / 4, np.float32)
    accepted = np.zeros(num_drafts, np.int64)
    accepted[: round(num_drafts * kept / 4)] = 4
    return paths, np.full(num_drafts, 4), accepted


def test_a_version_that_does_worse_is_told_and_one_that_is_never_accepted_is_silent() -> None:
    watch = ServedWatch(4)
    assert watch.observe(*drafts_of(MIN_DRAFTS, 2.4, 2.3)) == ""
    watch.begin()
    assert watch.observe(*drafts_of(MIN_DRAFTS, 2.4, 0.4)) == "worse"
    watch.begin()
    assert watch.observe(*drafts_of(MIN_DRAFTS, 2.4, 0.02)) == "worse"
    watch.begin()
    watch.observe(*drafts_of(MIN_DRAFTS, 1.0, 0.9))
    watch.begin()
    assert watch.observe(*drafts_of(MIN_DRAFTS, 3.2, 1.2)) == "", "it promises too much, and keeps more than before"
    silent = ServedWatch(4)
    assert silent.observe(*drafts_of(MIN_DRAFTS, 2.4, 0.02)) == "silent" and silent.silent
    silent.begin()
    assert not silent.silent


def test_each_depth_is_cooled_until_its_promises_hold() -> None:
    """A head that promises 0.8 everywhere and keeps 0.8, 0.6, 0.9 and 0.2; few drafts reach the last depth."""
    watch, rng = ServedWatch(6), np.random.default_rng(0)
    kept_K, num_drafts = np.array([0.8, 0.6, 0.9, 0.2]), 20

    def promised_K() -> np.ndarray:
        return np.exp(np.log(0.8) * watch.temperatures_K[:4])

    for _ in range(1500):
        paths = np.tile(np.cumprod(promised_K()), (num_drafts, 1)).astype(np.float32)
        accepted = (rng.random((num_drafts, 4)) < kept_K).cumprod(1).sum(1)
        watch.observe(paths, np.full(num_drafts, 4), accepted)
    np.testing.assert_allclose(promised_K(), [0.8, 0.6, 0.9, 0.2], atol=0.08)
    assert (watch.temperatures_K[4:] == 1.0).all(), "nothing was drafted there"
    hottest = watch.temperatures_K[3]
    watch.begin()
    assert 1.0 < watch.temperatures_K[3] < hottest, "another version may know more"


def after(ledger: Ledger, num_steps: int, seconds: float = 1.0, potential: float | None = 0.5, busy=None) -> Ledger:
    """Engine steps, half of whose time is arithmetic, beside a trainer that needs 25 ms a training step and takes its
    share."""
    owed = 0.0
    for _ in range(num_steps):
        owed += ledger.share
        trains = owed >= 1.0 if busy is None else busy
        owed -= trains
        ledger.observe_step(seconds * (1.5 if trains else 1.0), seconds, 0.5 * seconds, potential, trains, 0.025)
    return ledger


def test_a_trainer_that_earns_nothing_ends_and_is_tried_again() -> None:
    ledger = after(Ledger(), MIN_STEPS)
    assert ledger.share == 1.0 and ledger.advance_s == pytest.approx(0.5 * PAYBACK_STEPS)
    after(ledger, 3000)
    assert ledger.share == 1.0 and ledger.charged_s < ledger.advance_s, "it has an advance"
    after(ledger, 2000)
    assert ledger.share == 0.0 and ledger.charged_s > ledger.advance_s
    after(ledger, int(RETRY_S + 2 * PERIOD_S), busy=False)
    assert ledger.share == RETRY_SHARE


def test_a_trainer_that_earns_its_time_goes_on() -> None:
    ledger = after(Ledger(), MIN_STEPS)
    for _ in range(4400):
        ledger.observe_saved(0.9)
        after(ledger, 1)
    assert ledger.share == 1.0 and ledger.charged_s > ledger.advance_s


@pytest.mark.parametrize(
    ("seconds", "potential", "learns"),
    [
        (0.003, 0.001, False),  # cheap steps: learning takes 10 s of processor time, half of which lengthens them
        (0.060, 0.006, False),  # history drafts well
        (0.060, 0.020, True),
        (0.060, -0.010, False),  # history drafts better than a head could
    ],
)
def test_learning_has_to_promise_more_than_it_costs(seconds: float, potential: float, learns: bool) -> None:
    ledger = after(Ledger(), MIN_STEPS - 1, seconds, potential)
    assert ledger.share == 0.0, "nothing is trained before costs are known"
    after(ledger, 1, seconds, potential)
    assert ledger.share == (1.0 if learns else SMALLEST)
    after(ledger, int(120.0 / seconds), seconds, potential)
    assert learns or ledger.charged_s <= 0.011 * 120.0


def test_with_a_core_to_spare_learning_costs_little() -> None:
    assert after(Ledger(crowding=1.0), MIN_STEPS, 0.003, 0.001).share == SMALLEST
    assert after(Ledger(crowding=0.05), MIN_STEPS, 0.003, 0.001).share == 1.0


def test_the_advance_can_be_set() -> None:
    assert Ledger(advance_s=5.0).share == 1.0
    ledger = Ledger(advance_s=0.0)
    assert after(ledger, 500, potential=100.0).advance_s == 0.0, "what was asked for is not changed by what is seen"


def test_slowdown_is_measured() -> None:
    ledger = Ledger()
    for i in range(4000):
        busy = i % 5 == 0
        ledger.observe_step(0.13 if busy else 0.1, 0.1, 0.02, None, busy, 0.025)
    assert ledger.slowdown == pytest.approx(0.3, abs=0.05)
