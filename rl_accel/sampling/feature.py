"""Exact sampling as a feature."""

from rl_accel.feature import Feature
from rl_accel.sampling.config import SamplingConfig

FEATURE = Feature(
    name="sampling",
    title="exact sampling",
    config=SamplingConfig,
    samples=True,
    claims=frozenset({"vllm.sampler"}),
    try_out=("exact=true",),
    engine="rl_accel.sampling.hosts.engine:SamplingEngine",
    probe="rl_accel.sampling.hosts.probe:SamplingProbe",
)
