"""New rotations of K wait for a step in which no request has pages.

Host symbols: `execute_model` of vLLM's model runners; `SchedulerOutput.scheduled_new_reqs`, `.scheduled_cached_reqs`
(v1/core/sched/output.py).
"""

from __future__ import annotations

from typing import Any

from rl_accel.kvcache.rotation import Rotation


class PendingRotations:
    """Rotations of layers, put in force once; costs nothing when there are none."""

    def __init__(self) -> None:
        self._found: list[tuple[Any, Rotation]] = []

    def offer(self, runner: Any, found: list[tuple[Any, Rotation]]) -> None:
        """Put them in force before the first step of `runner` whose requests all begin; later ones replace them.

        Args:
            found: layer's `QuantizedPages` and what it is to do to K.
        """
        watching, self._found = bool(self._found), found
        if watching:
            return
        block_size = runner.vllm_config.cache_config.block_size
        own, execute = vars(runner).get("execute_model"), runner.execute_model

        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            if scheduler_output.total_num_scheduled_tokens and all_begin(scheduler_output, block_size):
                if own is None:
                    del runner.execute_model  # the class's is found again
                else:
                    runner.execute_model = own
                for impl, rotation in self._found:
                    impl.set_rotation(rotation)
                self._found = []
            return execute(scheduler_output, *args, **kwargs)

        runner.execute_model = execute_model


def all_begin(scheduler_output: Any, block_size: int) -> bool:
    """Whether a step reads nothing from the KV cache but what it writes itself.

    A request may begin with blocks of another one that begins in the same step.
    """
    if scheduler_output.scheduled_cached_reqs.req_ids:
        return False
    written: set[tuple[int, int]] = set()
    read: set[tuple[int, int]] = set()
    for request in scheduler_output.scheduled_new_reqs:
        for group, blocks in enumerate(request.block_ids):
            num_found = request.num_computed_tokens // block_size
            read.update((group, block) for block in blocks[:num_found])
            written.update((group, block) for block in blocks[num_found:])
    return read <= written
