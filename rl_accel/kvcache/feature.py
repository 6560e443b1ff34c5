"""The quantized KV cache as a feature."""

from rl_accel.feature import Feature, Metric
from rl_accel.kvcache.config import KVCacheConfig

FEATURE = Feature(
    name="kvcache",
    title="INT4 KV cache",
    config=KVCacheConfig,
    lossy=True,
    claims=frozenset({"vllm.kv_cache_dtype"}),
    metrics=(
        Metric("tokens", "tokens", "sum", "that fit into the KV caches of the engines"),
        Metric("bytes_per_token", "bytes", "max", "of K and V of a token, all layers of a rank"),
        Metric("order", "values", "mean", "of the rotation of K, over layers"),
        Metric("balanced_layers", "layers", "max", "whose dims of K are balanced against those of queries"),
        Metric("k_error", "1", "max", "error of K as measured when weights came, of its norm; over 4-bit layers"),
        Metric("measure_ms", "ms", "max", "measuring K, mean over weight syncs"),
    ),
    driver="rl_accel.kvcache.hosts.driver:KVCacheDriver",
    engine="rl_accel.kvcache.hosts.engine:KVCacheEngine",
    probe="rl_accel.kvcache.hosts.probe:KVCacheProbe",
    model_runners=("V1", "V2"),
    register="rl_accel.kvcache.hosts.register:register",
)
