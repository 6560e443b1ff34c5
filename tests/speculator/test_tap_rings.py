"""Rings of training ranks, found by name, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from rl_accel.speculator import tap_rings
from rl_accel.speculator.replay import Replay, is_held_out
from rl_accel.speculator.tap_rings import TapRings, make_ring
from rl_accel.speculator.traces import RowLayout

from .world import LAYOUT, rows_of

RANK = Path(__file__).with_name("rank_to_kill.py")


def _replay(policy: int) -> Replay:
    """As an engine has fed it, with requests 0 to 3."""
    replay = Replay(LAYOUT, 4096)
    replay.add(rows_of(4, 24, policy=policy))
    return replay


def test_ranks_are_found_and_read_to_their_end() -> None:
    """Two ranks write requests 2 to 9 and 10 to 17 and are killed; another run's ring is not looked at."""
    other, run = make_ring(LAYOUT, "other"), f"test{os.getpid()}"
    other.put(rows_of(2, 10, first=90))
    replay, rings = _replay(policy=7), TapRings(LAYOUT, run)
    rings.feed(replay)
    assert replay.num_rows == 96
    ranks = []
    for first in (2, 10):
        command = [sys.executable, str(RANK), run, str(first), "8", "24"]
        ranks.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    for rank in ranks:
        assert rank.stdout.readline() == "written\n"
    rings._searched = -tap_rings.SEARCH_S
    rings.feed(replay)
    for rank in ranks:
        rank.stdin.write("more\n")
        rank.stdin.flush()
        assert rank.stdout.readline() == "more\n"
        rank.send_signal(signal.SIGKILL)
        rank.wait()
    time.sleep(0.05)
    rings.feed(replay)
    rings.feed(replay)
    assert rings.num_rows == 2 * (8 + 1) * 24, "rows of the time before the kill were lost"
    # Requests 2 and 3 were known from the engine and are not there twice.
    assert replay.num_rows == 96 + (16 - 2 + 2) * 24
    assert not rings._rings and rings.num_failed == 0
    names = set(rows_of(18, 1)["request"].tolist()) | set(rows_of(2, 1, first=1000)["request"].tolist())
    assert set(replay._requests) <= names
    assert all(r.policy in (6, 7) for r in replay._requests.values())


def test_rows_of_another_layout_are_refused() -> None:
    run = f"layout{os.getpid()}"
    ring = make_ring(RowLayout(LAYOUT.num_features, LAYOUT.num_tokens, LAYOUT.vocab_size + 1), run)
    ring.put(rows_of(2, 10, layout=ring.layout))
    replay, rings = _replay(policy=1), TapRings(LAYOUT, run)
    rings.feed(replay)
    assert rings.num_failed == 1 and rings.num_rows == 0 and replay.num_rows == 96


def test_old_steps_are_stale_and_what_is_held_out_stays_so() -> None:
    """Steps 11 and 14 of a run whose engine counts its 14th step as policy 4: lag 3 is one too many."""
    run = f"steps{os.getpid()}"
    ring = make_ring(LAYOUT, run)
    ring.put(rows_of(40, 24, first=100, policy=11))
    ring.put(rows_of(40, 24, first=200, policy=14))
    replay, rings = _replay(policy=4), TapRings(LAYOUT, run)
    rings.feed(replay)
    policies = {r.policy for r in replay._requests.values()}
    assert policies == {1, 4}
    new = set(rows_of(40, 1, first=200)["request"].tolist())
    held = {name for name in new if is_held_out(name)}
    assert held
    for held_out in (False, True):
        fresh = {
            name
            for name, request in replay._requests.items()
            if is_held_out(name) == held_out and request.policy >= replay.policy - replay.max_policy_lag
        }
        assert (fresh & new) == (held if held_out else new - held)
    batch = replay.sample(4096)
    assert batch is not None and np.isfinite(batch.aux_BTA.numpy()).all()
