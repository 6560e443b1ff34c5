"""Low-bit experts as a feature."""

from rl_accel.feature import Feature, Metric
from rl_accel.moe.config import MoEConfig

FEATURE = Feature(
    name="moe",
    title="low-bit experts",
    config=MoEConfig,
    lossy=True,
    claims=frozenset({"vllm.quantization"}),
    metrics=(
        Metric("bits_per_weight", "bits", "max", "of what is quantized, packed, with scales and compensators"),
        Metric("error", "1", "mean", "of quantized weights, of their norm, over tensors of the last refresh"),
        Metric("alternations", "1", "mean", "of codes and compensator, over tensors of the last refresh"),
        Metric("refresh_s", "s", "max", "making low-bit weights since the last step"),
        Metric("refresh_share", "1", "max", "of the time of a step that this took"),
        Metric("version", "1", "max", "sets of weights that the engines have quantized, the first one included"),
    ),
    min_pearson=0.5,
    try_policy="quickstart_moe",
    driver="rl_accel.moe.hosts.driver:MoEDriver",
    engine="rl_accel.moe.hosts.engine:MoEEngine",
    trainer="rl_accel.moe.hosts.trainer:MoETrainer",
    probe="rl_accel.moe.hosts.probe:MoEProbe",
    model_runners=("V1", "V2"),
    register="rl_accel.moe.hosts.register:register",
)
