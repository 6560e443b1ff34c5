"""Traces and weights in shared memory, seen from two mappings as two processes see them."""

from __future__ import annotations

import os
import stat

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_accel.speculator.replay import Replay
from rl_accel.speculator.shared import SharedBytes
from rl_accel.speculator.traces import RowLayout, TraceRing
from rl_accel.speculator.weights import SHAPE as SHAPE_WORD
from rl_accel.speculator.weights import WeightSlots

from .world import LAYOUT, VOCAB, rows_of


def test_nobody_else_can_open_it() -> None:
    memory = SharedBytes(100, "test")
    assert stat.S_IMODE(os.fstat(memory.descriptor).st_mode) == 0o600
    assert not any("test" in name for name in os.listdir("/dev/shm"))
    with pytest.raises(ValueError, match="expected"):
        SharedBytes(1 << 20, descriptor=memory.descriptor)
    memory.close()


@pytest.mark.parametrize(("vocab_size", "num_tokens"), [(VOCAB, 1), (VOCAB, LAYOUT.num_tokens), (5000, 3)])
def test_rows_arrive_as_they_were_put(vocab_size: int, num_tokens: int) -> None:
    """One token a row, of a head without history, is a vector too."""
    layout = RowLayout(LAYOUT.num_features, num_tokens, vocab_size)
    writer = TraceRing(layout, 64)
    reader = TraceRing(layout, 64, writer.memory.descriptor)
    rows, seen = rows_of(5, 9, layout=layout), 0
    taken = []
    for start in range(0, 45, 15):
        writer.put({name: values[start : start + 15] for name, values in rows.items()})
        seen, found, lost = reader.take(seen)
        assert lost == 0
        taken.append(found)
    for name, values in rows.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in taken]), values)
    replay = Replay(layout, 256)
    replay.add(rows)
    assert replay.sample(20).tokens_BTN.shape[-1] == num_tokens


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=25))
def test_newest_rows_survive_and_the_lost_are_counted(calls: list[tuple[int, bool]]) -> None:
    ring, seen, put, got, lost = TraceRing(LAYOUT, 16), 0, 0, [], 0
    template = rows_of(1, 1)
    for count, takes in calls:
        rows = {name: np.repeat(values, count, 0) for name, values in template.items()}
        rows["position"] = np.arange(put, put + count, dtype=np.int32)
        ring.put(rows)
        put += count
        if takes:
            seen, found, missed = ring.take(seen)
            got.append(found["position"])
            lost += missed
    seen, found, missed = ring.take(seen)
    got.append(found["position"])
    positions = np.concatenate(got)
    assert seen == put and len(positions) + lost + missed == put
    assert (np.diff(positions) > 0).all()
    assert len(found["position"]) <= 16 and (not len(positions) or positions[-1] == put - 1)


def test_a_plain_number_is_meant_for_all_rows() -> None:
    ring = TraceRing(LAYOUT, 16)
    ring.put({**rows_of(1, 6), "policy": 7})
    assert ring.take(0)[1]["policy"].tolist() == [7] * 6


def weights(num: int = 50) -> WeightSlots:
    return WeightSlots(num, fingerprint=11)


def test_versions_alternate_and_are_copied() -> None:
    trainer = weights()
    engine = WeightSlots(50, 11, trainer.memory.descriptor)
    for version in range(1, 5):
        flat = np.full(50, float(version), np.float32)
        assert trainer.put(flat) == version
        found, copy, problem = engine.get()
        assert (found, problem) == (version, "") and np.array_equal(copy, flat)
        flat[:] = -1.0
        assert (copy == version).all()


@pytest.mark.parametrize("poison", ["nan", "inf", "damaged", "shape"])
def test_what_is_not_whole_is_refused_with_the_reason(poison: str) -> None:
    slots = weights()
    flat = np.ones(50, np.float32)
    if poison in ("nan", "inf"):
        flat[17] = float(poison)
    slots.put(flat)
    if poison == "damaged":
        slots._slots[int(slots.memory.words[1])][3] = 2.0
    if poison == "shape":
        slots.memory.words[SHAPE_WORD] = 12
    version, copy, problem = slots.get()
    assert version == 1 and copy is None
    assert {"nan": "finite", "inf": "finite", "damaged": "damaged", "shape": "shape"}[poison] in problem


def test_reports_keep_their_numbers() -> None:
    slots = weights()
    slots.report(num_steps=3, train_s=1.25, held_out_accept=2.5, busy=1)
    slots.report(rejected_weight=0.5)
    report = slots.read_report()
    assert (report.num_steps, report.train_s, report.held_out_accept, report.rejected_weight) == (3, 1.25, 2.5, 0.5)
    assert report.busy and slots.busy
    slots.allowed_share = 0.25
    assert slots.allowed_share == 0.25
    assert slots.version == 0
