"""The model of comm_model.py against SDP4Bit's published throughput.

Given is, of each row, the TFLOPs of the baseline: its seconds are the row's arithmetic over that. What the model says
of the baseline's communication is taken off, and what it says of SDP4Bit's is added. Fitted is the rate of a node's
link, and nothing else: on the A100 cluster one for a group of ranks that fills the nodes (no tensor parallelism) and
one for several groups with a rank a node each; on the H800 cluster one for both. Each is fitted on one row, `FIT`.
Which row matters little for A100 (5 % at most) and much for H800 (13B is 28 % off if fitted on 1.3B).

Assumed: a micro-batch of one sequence of 2,048 tokens, as the authors' scripts say (with 1,024, which their table
says, all steps are half as long, the fitted rates twice as high and beyond what Slingshot 10 has, and the TFLOPs about
the same); arithmetic as Megatron-LM reports it; NVLink and memory at two thirds of the data sheets; no overlap, as in
the scripts; a pipeline's bubble is in the baseline and stays. Gradients of the baseline are float32.
Source of TFLOPs and parallel sizes: the README of the authors' code (arXiv 2410.15526).
"""

from __future__ import annotations

from dataclasses import dataclass

from comm_model import WAYS, Cluster, Workload

SEQUENCE = 2048
VOCABULARY = 50304
SOURCE = "arXiv 2410.15526, README of its code: speed test and parallel configuration"


@dataclass(frozen=True)
class Machine:
    """GPUs of a published cluster; rates in bytes a second."""

    gpus: int
    """A node."""
    intra: float
    codec: float
    nodes: int = 16


MACHINES = {"a100": Machine(4, 200e9, 1.0e12), "h800": Machine(8, 130e9, 2.2e12)}
"""4 A100 and Slingshot 10; 8 H800 and InfiniBand."""


@dataclass(frozen=True)
class Row:
    """A published row."""

    machine: str
    model: str
    layers: int
    hidden: int
    tensor: int
    pipeline: int
    baseline: float
    """TFLOPs a GPU."""
    sdp4bit: float

    @property
    def flops(self) -> float:
        """Of a GPU and step, by Megatron-LM's formula."""
        shape = 1 + SEQUENCE / (6 * self.hidden) + VOCABULARY / (12 * self.layers * self.hidden)
        return 72 * SEQUENCE * self.layers * self.hidden**2 * shape / (self.tensor * self.pipeline)

    @property
    def parameters(self) -> float:
        """Of a GPU; both ends of a pipeline hold the embedding."""
        blocks = 12 * self.layers * self.hidden**2 / self.pipeline
        return (blocks + VOCABULARY * self.hidden) / self.tensor

    @property
    def link(self) -> str:
        """Which fitted rate applies."""
        return "h800" if self.machine == "h800" else f"a100, {'one group' if self.tensor == 1 else 'groups of one'}"


_SHAPES = {"1.3B": (24, 2048), "2.7B": (32, 2560), "6.7B": (32, 4096), "13B": (40, 5120), "18B": (40, 6144)}
_PUBLISHED: dict[str, dict[str, tuple[int, int, float, float]]] = {
    "a100": {
        "1.3B": (1, 1, 24.1, 57.6),
        "2.7B": (1, 1, 24.0, 58.4),
        "6.7B": (4, 1, 10.8, 37.1),
        "13B": (4, 2, 9.7, 26.0),
        "18B": (4, 2, 10.2, 29.8),
    },
    "h800": {
        "1.3B": (1, 1, 69.1, 106.0),
        "2.7B": (1, 1, 71.9, 116.9),
        "6.7B": (4, 1, 26.2, 77.9),
        "13B": (8, 1, 13.9, 53.5),
        "18B": (8, 1, 14.5, 59.2),
    },
}
ROWS = [
    Row(machine, model, *_SHAPES[model], tensor, pipeline, baseline, sdp4bit)
    for machine, rows in _PUBLISHED.items()
    for model, (tensor, pipeline, baseline, sdp4bit) in rows.items()
]
FIT = {"a100, one group": "1.3B", "a100, groups of one": "18B", "h800": "18B"}
"""Rate -> the row it is fitted on."""


def sdp4bit_tflops(row: Row, rate: float) -> float:
    """Return the predicted TFLOPs a GPU, with a node's link of `rate` bytes a second."""
    machine = MACHINES[row.machine]
    cluster = Cluster(
        nodes=machine.nodes // row.pipeline,
        ranks=machine.gpus // row.tensor,
        inter=rate / row.tensor,
        intra=machine.intra,
        ring_share=1.0,
        mesh_share=1.0,
        codec=machine.codec,
    )
    work = Workload(row.parameters, bucket=row.parameters / 8)
    seconds = row.flops / (row.baseline * 1e12)
    for way, sign in (("megatron", -1), ("sdp4bit_paper", 1)):
        plan = WAYS[way](cluster, work)
        seconds += sign * (plan.gradients_s(cluster) + plan.weights_s(cluster))
    return row.flops / seconds / 1e12


def fitted_rate(row: Row) -> float:
    """Return the rate at which a row is predicted as published, by bisection."""
    low, high = 1e9, 1e12
    while high / low > 1 + 1e-6:
        middle = (low * high) ** 0.5
        # A slower link explains more of the baseline's time, so SDP4Bit gains more.
        predicted = sdp4bit_tflops(row, middle)
        if predicted < 0 or predicted > row.sdp4bit:
            low = middle
        else:
            high = middle
    return high


def rates() -> dict[str, float]:
    return {
        link: fitted_rate(row) for link, model in FIT.items() for row in ROWS if (row.link, row.model) == (link, model)
    }
