"""New rotations of K wait for a step in which no request has pages.

Host symbols: `execute_model` of vLLM's model runners; `SchedulerOutput.scheduled_new_reqs`, `.scheduled_cached_reqs`
(v1/core/sched/output.py).
"""

from __future__ import annotations

from typing import Any

import torch


class PendingRotations:
    """Rotations of layers, put in force once; costs nothing when there are none."""

    def __init__(self) -> None:
        self._found: list[tuple[Any, int, torch.Tensor | None]] = []

    def offer(self, runner: Any, found: list[tuple[Any, int, torch.Tensor | None]]) -> None:
        """Put them in force before the first step of `runner` whose requests all begin; later ones replace them.

        Args:
            found: layer's `QuantizedPages`, order, shift.
        """
        watching, self._found = bool(self._found), found
        if watching:
            return
        own, execute = vars(runner).get("execute_model"), runner.execute_model

        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            if scheduler_output.total_num_scheduled_tokens and all_begin(scheduler_output):
                if own is None:
                    del runner.execute_model  # the class's is found again
                else:
                    runner.execute_model = own
                for impl, order, shift_KC in self._found:
                    impl.set_rotation(order, shift_KC)
                self._found = []
            return execute(scheduler_output, *args, **kwargs)

        runner.execute_model = execute_model


def all_begin(scheduler_output: Any) -> bool:
    """Whether no request of a step has tokens in the KV cache."""
    fresh = all(request.num_computed_tokens == 0 for request in scheduler_output.scheduled_new_reqs)
    return fresh and not scheduler_output.scheduled_cached_reqs.req_ids
