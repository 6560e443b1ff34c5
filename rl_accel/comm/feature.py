"""4-bit communication as a feature."""

from rl_accel.comm.config import CommConfig
from rl_accel.feature import Feature, Metric

FEATURE = Feature(
    name="comm",
    title="4-bit communication",
    config=CommConfig,
    lossy=True,
    claims=frozenset({"deepspeed.collectives"}),
    metrics=(
        Metric(
            "gradient_intra_bytes",
            "bytes",
            "mean",
            "sent by a rank to others of its node since the last update; 0 where plain communication was used",
        ),
        Metric("gradient_inter_bytes", "bytes", "mean", "the same to other nodes"),
        Metric("weight_intra_bytes", "bytes", "mean", "the same of weights, inside the node"),
        Metric("weight_inter_bytes", "bytes", "mean", "the same of weights, to other nodes"),
        Metric(
            "weight_resyncs",
            "1",
            "mean",
            "times that weights went out in full because something else than the optimizer had written them",
        ),
        Metric("num_nodes", "nodes", "mean", "that the ranks are on, as the two levels see them"),
        Metric("gradients_s", "s", "mean", "in the collectives, quantized or plain; on a GPU of timed steps only"),
        Metric("weights_s", "s", "mean", "the same of weights"),
        Metric("gradients_quantized", "1", "mean", "share of updates whose gradients were quantized"),
        Metric("weights_quantized", "1", "mean", "share of updates whose weights were quantized"),
    ),
    driver="rl_accel.comm.hosts.driver:CommDriver",
    rank="rl_accel.comm.hosts.rank:CommRank",
    probe="rl_accel.comm.hosts.probe:CommProbe",
)
