"""When the trainer may have one of the engine's cores."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

from rl_accel.speculator.hosts.cores import CHEAP, FIRST_S, MAX_OWED_S, MIN_TURN, Turns


def experienced() -> Turns:
    turns = Turns()
    assert not turns.needs_cores(FIRST_S - 0.1, 1.0, 0.1, True), "a head that has learned nothing goes first"
    assert not turns.needs_cores(FIRST_S, 1.0, 0.1, False)
    turns.needs_cores(0.1, 0.1, 0.1, True)
    return turns


def test_steps_that_are_long_because_of_their_tokens_need_all_cores() -> None:
    turns = experienced()
    assert not turns.needs_cores(0.1, 0.0, 0.0, False), "nothing is known yet: learn"
    assert turns.needs_cores(0.1, 0.1, 0.02, False)
    assert not turns.needs_cores(0.03, 0.03, CHEAP * 0.03, True)


def test_where_no_step_is_cheap_the_trainer_gets_its_share_in_turns() -> None:
    turns = experienced()
    free = [not turns.needs_cores(0.1, 0.1, 0.01, False) for _ in range(4000)]
    assert abs(sum(free) / len(free) - MIN_TURN) < 0.05
    changes = sum(a != b for a, b in itertools.pairwise(free))
    assert changes <= 2 + 2 * 400.0 * MIN_TURN / (MAX_OWED_S / (1.0 - MIN_TURN)), "seconds each, not single steps"


def test_cheap_steps_count_as_turns() -> None:
    """Rollouts with a long tail: the trainer has its time there and takes none of the rest."""
    turns = experienced()
    for _ in range(100):
        assert all(turns.needs_cores(0.1, 0.1, 0.01, False) for _ in range(15))
        assert not any(turns.needs_cores(0.02, 0.02, 0.015, True) for _ in range(40))


def test_a_core_is_left_and_taken_back() -> None:
    """In a process of its own: the number of threads is the process's."""
    script = """
import os, torch
from rl_accel.speculator.hosts.cores import Cores
cores = len(os.sched_getaffinity(0))
torch.set_num_threads(max(cores, 2))
engine = Cores()
assert engine.free == 0
before = torch.get_num_threads()
engine.leave(1)
assert torch.get_num_threads() == before - 1
engine.leave(5)
assert torch.get_num_threads() == 1
engine.leave(0)
assert torch.get_num_threads() == before
torch.set_num_threads(1)
small = Cores()
small.leave(1)
assert torch.get_num_threads() == 1 and small.free == cores - 1
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env=dict(os.environ))


def test_a_core_that_is_shared_is_told_from_one_that_is_free() -> None:
    """In a process of its own: the number of threads is the process's."""
    script = """
import os, torch
from rl_accel.speculator.hosts.cores import FREE_CROWDING, Cores
cores = len(os.sched_getaffinity(0))
for threads in range(1, cores + 1):
    torch.set_num_threads(threads)
    free = cores - threads
    assert Cores().crowding(1) == (FREE_CROWDING if free else max(1 / max(threads - 1, 1), FREE_CROWDING))
    assert Cores().crowding(free + 1) == max(1 / max(threads - 1, 1), FREE_CROWDING)
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
