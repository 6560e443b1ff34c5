"""The watched weight sync as a feature."""

from rl_accel.feature import Feature, Metric
from rl_accel.weight_sync.config import SyncConfig

FEATURE = Feature(
    name="sync",
    title="watched weight sync",
    config=SyncConfig,
    model_runners=("V1", "V2"),
    free=("timeout_s", "readback"),
    metrics=(
        Metric("seconds", "s", "max", "the last weight sync, as the engine saw it"),
        Metric("bytes", "bytes", "max", "of the last weight sync; CPU only"),
        Metric(
            "readback_max_abs_err",
            "1",
            "max",
            "largest difference of sent and used weights, of the last sync that was read back; CPU only",
        ),
    ),
    driver="rl_accel.weight_sync.hosts.driver:SyncDriver",
    engine="rl_accel.weight_sync.hosts.engine:SyncEngine",
    trainer="rl_accel.weight_sync.hosts.trainer:SyncTrainer",
)
