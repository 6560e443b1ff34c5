"""Traces as a feature."""

from rl_accel.feature import Feature
from rl_accel.trace.config import TraceConfig

FEATURE = Feature(
    name="trace",
    title="token traces",
    config=TraceConfig,
    driver="rl_accel.trace.hosts.driver:TraceDriver",
    trainer="rl_accel.trace.hosts.trainer:TraceTrainer",
)
