"""New rotations wait for a step in which no request has pages."""

from __future__ import annotations

from types import SimpleNamespace

from rl_accel.kvcache.hosts.pending import PendingRotations
from rl_accel.kvcache.rotation import Rotation


class Layer:
    order = 16

    def set_rotation(self, rotation) -> None:
        self.order = rotation.order


class Runner:
    """A model runner as far as it is asked: steps are recorded with the order that they saw."""

    vllm_config = SimpleNamespace(cache_config=SimpleNamespace(block_size=32))

    def __init__(self, layer: Layer):
        self.layer, self.seen = layer, []

    def execute_model(self, scheduler_output, intermediate=None):
        self.seen.append(self.layer.order)
        return "output"


def step(*new: tuple[int, list[int]], running: tuple[str, ...] = ()) -> SimpleNamespace:
    """Of a scheduler: tokens found and blocks of requests that begin, names of those that go on."""
    return SimpleNamespace(
        total_num_scheduled_tokens=len(new) + len(running),
        scheduled_new_reqs=[SimpleNamespace(num_computed_tokens=n, block_ids=(blocks,)) for n, blocks in new],
        scheduled_cached_reqs=SimpleNamespace(req_ids=list(running)),
    )


def test_they_wait_for_requests_with_pages_and_for_cached_prefixes() -> None:
    layer = Layer()
    runner, pending = Runner(layer), PendingRotations()
    runner.execute_model(step((0, [1])))
    pending.offer(runner, [(layer, Rotation(32))])
    pending.offer(runner, [(layer, Rotation(8))])  # weights came again before a step
    waiting = (
        step(running=("a",)),
        step(),
        step((0, [1, 2]), running=("a",)),
        step((64, [5, 6, 7])),
        step((0, [1, 2]), (64, [1, 6, 7])),
    )
    for scheduled in (*waiting, step((0, [1, 2]), (32, [1, 3]), (64, [1, 3, 4]))):  # found in the same step
        assert runner.execute_model(scheduled) == "output"
    assert runner.seen == [16] * 6 + [8]
    assert "execute_model" not in vars(runner), "nothing is left that a step would go through"
    pending.offer(runner, [(layer, Rotation(64))])
    runner.execute_model(step((0, [1])))
    assert runner.seen[-1] == 64
