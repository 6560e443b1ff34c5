"""Writes to TransferQueue that arrive in a burst go together."""

from __future__ import annotations

import asyncio
import time
from types import ModuleType
from typing import Any

from rl_accel.patching import HostPatch

MAX_WAIT_S, IDLE_GAP_S = 0.06, 0.015
"""A write waits for others so long at most, and so long for the next one."""


class BatchedPut(HostPatch):
    """`_agent_loop_postprocess` writes each response to TransferQueue by itself; writes of a moment go together."""

    target = "verl.trainer.ppo.v1.agent_loop_tq:tq"

    @classmethod
    def replace(cls, module: Any) -> None:
        module.tq = _BatchingQueue(module.tq, module.list_of_dict_to_tensordict)
        module.list_of_dict_to_tensordict = lambda fields: fields

    @classmethod
    def is_live(cls, module: ModuleType) -> bool:
        return isinstance(module.tq, _BatchingQueue)


class _BatchingQueue:
    """TransferQueue's module with an `async_kv_batch_put` that gathers what arrives in a burst.

    Only what has one partition and fields of the same names and types goes together: a TensorDict has the fields of its
    first row. The writer is a task of its own, so a caller that is cancelled takes nobody else's rows with it.
    """

    def __init__(self, queue: Any, to_tensordict: Any):
        self._queue, self._to_tensordict = queue, to_tensordict
        self._waiting: dict[tuple[str, frozenset], list[tuple[list, list, list, asyncio.Future]]] = {}
        self._writer: asyncio.Task | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)

    async def async_kv_batch_put(self, keys: list, fields: list, tags: list, partition_id: str) -> None:
        written = asyncio.get_running_loop().create_future()
        kind = frozenset((name, type(value)) for name, value in fields[0].items())
        self._waiting.setdefault((partition_id, kind), []).append((keys, fields, tags, written))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write())
        await written

    async def _write(self) -> None:
        until, seen = time.monotonic() + MAX_WAIT_S, 0
        while (arrived := sum(map(len, self._waiting.values()))) > seen and time.monotonic() < until:
            seen = arrived
            await asyncio.sleep(IDLE_GAP_S)
        while self._waiting:
            (partition_id, _), items = self._waiting.popitem()
            await self._flush(partition_id, items)

    async def _flush(self, partition_id: str, items: list[tuple[list, list, list, asyncio.Future]]) -> None:
        try:
            await self._queue.async_kv_batch_put(
                keys=[key for item in items for key in item[0]],
                fields=self._to_tensordict([field for item in items for field in item[1]]),
                tags=[tag for item in items for tag in item[2]],
                partition_id=partition_id,
            )
        except BaseException as error:
            for *_, written in items:
                if not written.done():
                    written.set_exception(error)
            return
        for *_, written in items:
            if not written.done():
                written.set_result(None)
