"""Work that every rank does for itself and that counts only if it succeeds on all: checks, and changes to a host.

A rank that fails alone would leave the others waiting in their next collective. Here the ranks tell each other, and the
error of one is raised on all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from rl_accel.errors import CommError, RLAccelError


@contextmanager
def on_all_ranks(group: dist.ProcessGroup) -> Iterator[dict[str, Any]]:
    """Run the block on every rank, then compare. Collective over `group`.

    Yields:
        a dict for what must be equal on all ranks, name -> value.

    Raises:
        RLAccelError: on every rank, of the class that the first failing rank raised (CommError for others than ours).
        CommError: on every rank, if the ranks put different values into the dict.
    """
    facts: dict[str, Any] = {}
    problem: tuple[type[RLAccelError], str] | None = None
    caught: Exception | None = None
    try:
        yield facts
    except RLAccelError as error:
        problem, caught = (type(error), str(error)), error
    except Exception as error:  # a bug, or a host that is not what it was: the other ranks must hear of it too
        problem, caught = (CommError, f"{type(error).__name__}: {error}"), error
    answers: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(answers, (problem, facts), group=group)
    own = dist.get_rank(group)
    for rank, (theirs, _) in enumerate(answers):
        if theirs is not None:
            kind, text = theirs
            raise kind(text if rank == own else f"{text} (found on rank {rank})") from caught
    for rank, (_, theirs) in enumerate(answers):
        for name, value in theirs.items():
            if facts.get(name) != value:
                raise CommError(
                    f"ranks disagree on {name} of 4-bit communication: rank {own} has {facts.get(name)}, "
                    f"rank {rank} has {value}"
                )
