"""The speculator's numbers at `/metrics` of vLLM's server, in Prometheus' format beside vLLM's own.

An answer to `/metrics` begins with a call to the engine's worker, which adds up what features drained; then vLLM's own
route writes everything that is registered with prometheus_client. Names: `rl_accel_<feature>_<metric>` of the features'
tables (docs/metrics.md); what is summed up since the start ends in `_total`.

Left out: several API servers in front of one engine, and data-parallel ranks other than the first.

Host symbols (vLLM 0.28.0): the options `--middleware` and `--worker-extension-cls`; `app.state.engine_client`,
`EngineClient.collective_rpc`; `get_prometheus_registry()`, prometheus_client's default one with one API server.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from rl_accel.feature import features

logger = logging.getLogger(__name__)

EXTENSION = "rl_accel.speculator.hosts.serving.MetricsWorkerExtension"
MIDDLEWARE = "rl_accel.speculator.hosts.serving.SpeculatorMetrics"
TIMEOUT_S = 5.0
"""For the engine's answer; after that the numbers are those of the time before."""
ADDED_UP = {
    "speculator": (
        "swaps", "num_asked", "rows_traced", "rows_from_trainer", "train_steps", "train_s", "saved_s", "charged_s",
    ),
    "draft": (
        "num_steps", "drafted_by_*", "accepted_by_*", "problems_renewed", "requests_let_go", "segments_dropped",
        "rollouts_lost",
    ),
}  # fmt: skip
"""Features that are shown, and their metrics that `drain` counts from one call to the next."""
MAY_FALL = frozenset({"speculator/saved_s"})
"""Sums that are no counters."""
COUNTS = {
    "num_drafts": "drafts that were verified, one a request and step",
    "num_draft_tokens": "draft tokens that were verified",
    "num_accepted_tokens": "draft tokens that were accepted",
    "num_emitted_tokens": "tokens of steps in which anything was drafted",
}
"""Of `SpecDecodeCounter`, shown as metrics of `draft`."""


class MetricsWorkerExtension:
    """Mixed into vLLM's worker class."""

    model_runner: Any

    def rl_accel_metrics(self) -> dict[str, float]:
        """Return "feature/metric" -> sum since the start, or present value; {} on ranks that have none to tell."""
        runner = self.model_runner
        found: dict[str, float] = {}
        for name, role in getattr(runner, "rl_accel", {}).items():
            found |= {f"{name}/{metric}": value for metric, value in role.drain().items()} if name in ADDED_UP else {}
        if not found:
            return {}
        if runner.rl_accel_spec_stats is not None:
            found |= {f"draft/{count}": float(value) for count, value in runner.rl_accel_spec_stats.drain().items()}
        sums = runner.__dict__.setdefault("rl_accel_sums", {})
        for key, value in found.items():
            if is_added_up(key):
                found[key] = sums[key] = sums.get(key, 0.0) + value
        return found


class SpeculatorMetrics:
    """ASGI middleware of vLLM's API server."""

    def __init__(self, app: Any):
        from vllm.v1.metrics.prometheus import get_prometheus_registry

        self._app, self._failed = app, False
        self._values: Mapping[str, float] = {}
        get_prometheus_registry().register(self)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"].rstrip("/").endswith("/metrics"):
            await self._refresh(scope["app"].state.engine_client)
        await self._app(scope, receive, send)

    async def _refresh(self, engine: Any) -> None:
        try:
            answers = await asyncio.wait_for(engine.collective_rpc("rl_accel_metrics"), TIMEOUT_S)
        except Exception as error:  # vLLM's own metrics do not need it
            if not self._failed:
                logger.warning("rl_accel: /metrics without new numbers of the engine (logged once): %r", error)
            self._failed = True
            return
        self._values = next(filter(None, answers), self._values)

    def collect(self) -> Iterator[Any]:
        """Give prometheus_client the numbers of the last call."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for key, value in sorted(self._values.items()):
            counts = is_added_up(key) and key not in MAY_FALL
            family = CounterMetricFamily if counts else GaugeMetricFamily
            yield family("rl_accel_" + key.replace("/", "_"), _meaning(key), value=value)


def is_added_up(key: str) -> bool:
    """Whether a metric, "feature/metric", is summed up since the start of the engine."""
    feature, metric = key.split("/")
    if metric in COUNTS:
        return True
    return any(metric == name or (name[-1] == "*" and metric.startswith(name[:-1])) for name in ADDED_UP[feature])


def _meaning(key: str) -> str:
    feature, metric = key.split("/")
    if metric in COUNTS:
        return COUNTS[metric]
    line = features()[feature].metric(metric)
    return f"{line.meaning} ({line.unit})"
