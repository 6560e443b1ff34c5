"""Puts our engines beside verl's own; DeepSpeed is imported when one is built.

Host symbols: `EngineRegistry.register`.
"""

from __future__ import annotations

from types import ModuleType


def register_engines(module: ModuleType) -> None:
    """Called when verl has imported its FSDP engine, on which ours are built."""
    from verl.workers.engine.base import EngineRegistry

    from rl_accel.deepspeed.hosts import engine as ours

    for model_type, engine in (
        ("language_model", ours.DeepSpeedEngineWithLMHead),
        ("value_model", ours.DeepSpeedEngineWithValueHead),
    ):
        EngineRegistry.register(model_type=model_type, backend="deepspeed", device=["cuda", "npu", "cpu"])(engine)
