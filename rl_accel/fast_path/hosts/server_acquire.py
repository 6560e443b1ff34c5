"""The load balancer is asked once where there is one engine."""

from __future__ import annotations

import asyncio
from types import ModuleType
from typing import Any

from rl_accel.patching import HostPatch


class CachedServerAcquire(HostPatch):
    """`LLMServerClient._acquire_server` asks the load balancer for every request; one engine needs one answer."""

    target = "verl.workers.rollout.llm_server:LLMServerClient._acquire_server"
    parameters = ("self", "request_id")

    @classmethod
    def replace(cls, module: ModuleType) -> None:
        acquire, release = module.LLMServerClient._acquire_server, module.LLMServerClient._release_server

        def of_one_engine(self):
            if "_rl_accel_one_engine" not in self.__dict__:
                self._rl_accel_one_engine = has_one_engine(self.config)
            return self._rl_accel_one_engine

        async def acquire_server(self, request_id, **fields):
            if not of_one_engine(self):
                return await acquire(self, request_id, **fields)
            answer = self.__dict__.get("_rl_accel_answer")
            if answer is None or (answer.done() and (answer.cancelled() or answer.exception())):
                answer = self._rl_accel_answer = asyncio.ensure_future(acquire(self, request_id, **fields))
            return await asyncio.shield(answer)  # a request that is cancelled leaves the answer to the others

        def release_server(self, server_id, request_id=None):
            if not of_one_engine(self):
                release(self, server_id, request_id)

        module.LLMServerClient._acquire_server = acquire_server
        module.LLMServerClient._release_server = release_server

    @classmethod
    def is_live(cls, module: ModuleType) -> bool:
        return module.LLMServerClient._acquire_server.__module__ == __name__


def has_one_engine(config: Any) -> bool:
    """Whether the run has a single rollout engine."""
    rollout = config.actor_rollout_ref.rollout
    parts = ("tensor_model_parallel_size", "data_parallel_size", "pipeline_model_parallel_size")
    per_engine = 1
    for name in parts:
        per_engine *= int(rollout.get(name, 1) or 1)
    return config.trainer.nnodes * config.trainer.n_gpus_per_node == per_engine
