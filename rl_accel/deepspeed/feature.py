"""The DeepSpeed training engine as a feature."""

from rl_accel.deepspeed.config import DeepSpeedConfig
from rl_accel.feature import Feature

FEATURE = Feature(
    name="deepspeed",
    title="training by DeepSpeed",
    config=DeepSpeedConfig,
    driver="rl_accel.deepspeed.hosts.driver:DeepSpeedDriver",
    probe="rl_accel.deepspeed.hosts.probe:DeepSpeedProbe",
    import_hooks={"verl.workers.engine.fsdp.transformer_impl": "rl_accel.deepspeed.hosts.register:register_engines"},
)
