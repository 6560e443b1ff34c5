"""Calls from verl's trainer to the rollout engines, and what features' answers add up to.

A rollout engine is a replica of verl, a tensor-parallel group whose ranks all answer. Only one of them may have
something to say, so a replica's answer is the first that is not empty.

Host symbols: `trainer.llm_server_manager.get_replicas()`; `vLLMHttpServer.collective_rpc`, which a patch of ours makes
return its answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import ray

from rl_accel.feature import features

CALL = "rl_accel_call"
"""Of the worker extension."""
_REDUCTIONS: dict[str, Callable[[list[float]], float]] = {"sum": sum, "max": max, "mean": fmean}


class RolloutEngines:
    """All engines of one trainer, in a fixed order."""

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def servers(self) -> list[Any]:
        return [replica.servers[0] for replica in self._trainer.llm_server_manager.get_replicas()]

    def call(self, feature: str, method: str, *args: Any) -> list[Any]:
        """Call a method of a feature's `Engine` in every rollout engine; returns an answer of each."""
        return self.call_each(feature, method, [args] * len(self.servers()))

    def call_each(self, feature: str, method: str, arguments: Sequence[tuple]) -> list[Any]:
        """The same with arguments of its own for every engine."""
        calls = [
            server.collective_rpc.remote(CALL, args=(feature, method, args))
            for server, args in zip(self.servers(), arguments, strict=True)
        ]
        return [first_answer(answers) for answers in ray.get(calls)]

    @staticmethod
    def call_some(servers: Sequence[Any], feature: str, method: str, *args: Any) -> list[Any]:
        """The same call in some of the engines. Large arguments travel once: Ray keeps them until all have a copy."""
        shared = ray.put((feature, method, args))
        answers = ray.get([server.collective_rpc.remote(CALL, args=shared) for server in servers])
        return list(map(first_answer, answers))

    def ask(self, method: str) -> list[Any]:
        """Call a method of the worker extension itself in every engine; returns its first rank's answer."""
        return [answers[0] for answers in ray.get([s.collective_rpc.remote(method) for s in self.servers()])]


def first_answer(answers: Sequence[Any]) -> Any:
    """Return the answer of the rank that has one."""
    return next((answer for answer in answers if answer), answers[0])


def add_up(drained: Iterable[Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Reduce what the engines' features drained, feature -> metric -> value, by the tables of the features."""
    values: dict[tuple[str, str], list[float]] = {}
    for answer in drained:
        for feature, metrics in answer.items():
            for metric, value in metrics.items():
                values.setdefault((feature, metric), []).append(value)
    return {
        f"rl_accel/{feature}/{metric}": float(_REDUCTIONS[features()[feature].metric(metric).reduction](found))
        for (feature, metric), found in sorted(values.items())
    }
