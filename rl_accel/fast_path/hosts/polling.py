"""When the replay buffer is asked whether a rollout is done."""

from __future__ import annotations

import time
from typing import Any

POLL_INTERVAL_S = 0.05
MIN_SHARE = 0.6
"""Share of the shortest of the last rollouts within which nobody asks whether this one is done."""


class AdaptivePolling:
    """Polls of the replay buffer: none until a rollout can be done by the last ones' times, then every 50 ms.

    A poll that replaces groups (`filter_groups`, `sync_refill_failed_groups`) starts rollouts, and a sampler of the
    user's own may do anything: these keep verl's interval.
    """

    def __init__(self, replay_buffer: Any):
        self._recent: dict[str, list[float]] = {}
        self._started: float | None = None
        if only_collects(replay_buffer):
            self._install(replay_buffer)

    def _install(self, replay_buffer: Any) -> None:
        sample, wait = replay_buffer.sample, replay_buffer._wait_for_next_poll

        def timed_sample(global_steps: int, partition_id: str, batch_size: int) -> Any:
            self._started = time.monotonic()
            found = sample(global_steps=global_steps, partition_id=partition_id, batch_size=batch_size)
            recent = self._recent.setdefault(partition_id, [])
            recent.append(time.monotonic() - self._started)
            del recent[:-8]
            return found

        def adaptive_wait(partition_id: str, last_debug_time: float) -> float:
            replay_buffer.poll_interval = self.interval(partition_id, time.monotonic() - (self._started or 0.0))
            return wait(partition_id, last_debug_time)

        replay_buffer.sample, replay_buffer._wait_for_next_poll = timed_sample, adaptive_wait

    def interval(self, partition_id: str, elapsed_s: float) -> float:
        """Return the seconds to the next poll of a rollout that began `elapsed_s` ago."""
        recent = self._recent.get(partition_id, [])
        if len(recent) < 3:  # the first of a run takes several times as long
            return POLL_INTERVAL_S
        return max(POLL_INTERVAL_S, MIN_SHARE * min(recent) - elapsed_s)


def only_collects(replay_buffer: Any) -> bool:
    """Whether a poll of this replay buffer does nothing but look what is finished."""
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    if type(replay_buffer) is not ReplayBuffer:
        return False
    return replay_buffer.filter_groups_metric is None and not replay_buffer.sync_refill_failed_groups
