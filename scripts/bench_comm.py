"""4-bit communication (SDP4Bit) between nodes with a slow network: seconds and bytes of a training step.

    sudo python scripts/bench_comm.py [--nodes 2] [--ranks 2] [--rate 25mbit,100mbit,1gbit,none] [--json FILE]
    sudo python scripts/bench_comm.py --stages [--json FILE]

    sudo python scripts/bench_comm.py --fsdp2 bfloat16 [--json FILE]

TinyGPT in bfloat16 (3.2 million parameters), DeepSpeed ZeRO-1, one short sequence a step and rank, gloo, one thread a
rank. Nodes are network namespaces (slow_network.py). One engine trains on; in every block each arm has
its turn of a few steps, in an order that changes, and what is attached is all that differs:

    deepspeed       nothing attached: all-reduce of gradients, all-gather of weights, bfloat16
    deepspeed_reduce   nothing attached, use_multi_rank_bucket_allreduce=false: gradients are reduced to their owners
    bf16            reduce-scatter by all-to-all and all-gather, bfloat16: half the bytes of an all-reduce
    bf16_two_level  the same inside nodes first
    zeropp          bit widths of ZeRO++: int8 weights, int4 gradients, groups of 2048
    sdp4bit         the defaults, always on
    sdp4bit_overlap the same; weights arrive while the next forward pass runs
    sdp4bit_auto    the defaults: plain where the link is too fast to gain
    weights_only, gradients_only   on request (--arms)

step      seconds, the slowest rank's; p50 and p95 of all steps; blocks: least and most of the blocks' medians
ratio     DeepSpeed's time / the arm's, median and range over blocks; above 1 is faster. DeepSpeed's is that of its
          default or of deepspeed_reduce, whichever has the smaller median at this rate. `of bf16`: of the arm
          bf16_two_level, the best without codes
wire      MB that a node sends to the others in a step, as its interface counts them (headers and repeats included)
compute   seconds of a step outside the two collectives, also waiting for other ranks at the gradients' norm
gradients, weights   seconds inside the collectives, codec and waiting included; mean of the ranks. Of sdp4bit_overlap:
          what is left of them to wait for; `hidden` is the part of sdp4bit's that is not
bound     the bytes at the rate plus the least compute of all arms: no codec, no latency, no waiting. A token bucket
          lets a few kilobytes through at once
bits      a value that must cross, counted in steps of their own without a limit: of P values each node needs 1/N of the
          reduced gradients from the others and lacks (N-1)/N of the new weights, so (N-1)P/N cross per node either way.
          `codec`: from the bytes that the collectives count. An all-reduce sends gradients across more than once

--buckets N: gradients go in N buckets, as those of a model of N times `reduce_bucket_size` parameters do. A bucket
holds parameters that follow each other, which one or two ranks own, so that all others send to these at the same time.
--device-ms T: every layer waits T ms in forward and 2 T ms in backward passes, as if an accelerator computed it, which
leaves the cores to communication. Without it ranks share the cores, and what is hidden is only what the network takes.
--fsdp2 DTYPE: FSDP2 instead of DeepSpeed, with gradients on their way in float32 (verl's default) or bfloat16; 4-bit
weights go to secondary shards. `fsdp2` is the host alone. Its weights cross in passes, so `bits` are not told apart.
--round-robin: `round_robin_gradients`, which deals parameters out to ranks in turn, for DeepSpeed and for ours.

--stages: peak memory of a rank (model, optimizer, communication) and bytes of a step for ZeRO-2 (also with
max_buffer_mib=2) and ZeRO-3. Its limits of live and kept parameters are a tenth of the model and none, as for models
far larger than the defaults.

Needs Linux, root and iproute2. Runs the operation's tests first and stops if they fail.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comm_ranks import RankError, Ranks, end_in_order
from slow_network import NetworkError, SlowNetwork, bits_per_second, check_machine

from rl_accel import machine, processes
from rl_accel.hosts import versions

SCRIPTS = Path(__file__).resolve().parent
RANK = str(SCRIPTS / "comm_bench_rank.py")
HOSTS = ("deepspeed", "deepspeed_reduce", "fsdp2")
"""Arms with nothing of ours."""
TIMED = ("deepspeed", "deepspeed_reduce", "bf16", "bf16_two_level", "zeropp", "sdp4bit", "sdp4bit_auto")
TIMED_FSDP2 = ("fsdp2", "bf16_two_level", "sdp4bit", "sdp4bit_auto")
FAIR = "bf16_two_level"
SPLIT_STEPS = 2
"""Steps in which bytes of gradients and weights are counted apart."""
SETTLING_STEPS = 9
"""Steps after which `sdp4bit_auto` has made its first choice."""
ZERO1 = {"stage": 1, "reduce_bucket_size": 500_000_000}


def arms(ranks: int, backend: str, fsdp2: bool = False) -> dict[str, dict[str, Any] | None]:
    """Arm -> fields of SDP4BitConfig; None: nothing attached; `optimizer`: attributes of DeepSpeed's, and nothing
    attached."""
    from dataclasses import asdict

    from rl_accel.comm import SDP4BitConfig

    common = {"backend": backend, "bypass": "never", "local_size": ranks}
    plain = {"weight_bits": 16, "intra_bits": 16, "inter_bits": 16, "hadamard": False}
    deepspeed: dict[str, Any] = {
        "deepspeed": None,
        "deepspeed_reduce": {"optimizer": {"use_multi_rank_bucket_allreduce": False}},
        "bf16": {**common, **plain, "local_size": 1},
        "sdp4bit_overlap": {**common, "overlap_weights": True},
    }
    return {
        **({"fsdp2": None} if fsdp2 else deepspeed),
        "bf16_two_level": {**common, **plain},
        "zeropp": asdict(SDP4BitConfig.zeropp()) | common,
        "sdp4bit": common,
        "sdp4bit_auto": {**common, "bypass": "auto"},
        "weights_only": {**common, "gradients": False},
        "gradients_only": {**common, "weights": False},
    }


@dataclass
class Arm:
    """What one arm's steps at one rate came to."""

    blocks: list[list[float]] = field(default_factory=list)
    """Seconds of every step, the slowest rank's, by block."""
    sent: list[float] = field(default_factory=list)
    """Bytes a node and step, by block."""
    gradients_s: list[float] = field(default_factory=list)
    weights_s: list[float] = field(default_factory=list)
    compute_s: list[float] = field(default_factory=list)

    def add(self, answers: list[dict[str, Any]], per_node: int) -> None:
        """Take the answers of all ranks to one order `measure`."""
        self.blocks.append([max(step) for step in zip(*(answer["step_s"] for answer in answers), strict=True)])
        steps = len(self.blocks[-1])
        self.sent.append(statistics.mean(answer["sent"] for answer in answers[::per_node]) / steps)
        self.add_seconds(answers)

    def add_seconds(self, answers: list[dict[str, Any]]) -> None:
        """Take where the time went, mean of the ranks, from those that had a handle."""
        for answer in answers:
            if answer["stats"]:
                steps = len(answer["step_s"])
                inside = [answer["stats"][f"{what}_s"] / steps for what in ("gradients", "weights")]
                self.gradients_s.append(inside[0])
                self.weights_s.append(inside[1])
                self.compute_s.append(statistics.mean(answer["step_s"]) - sum(inside))

    @property
    def medians(self) -> list[float]:
        return [statistics.median(block) for block in self.blocks]

    @property
    def p50(self) -> float:
        return statistics.median(self.steps)

    @property
    def p95(self) -> float:
        ordered = sorted(self.steps)
        return ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]

    @property
    def steps(self) -> list[float]:
        return [step for block in self.blocks for step in block]


def bound(arm: Arm, rate: str, found: dict[str, Arm]) -> float:
    """Seconds of a step with a link that is always full and the computation of the quickest arm."""
    bits = bits_per_second(rate)
    compute = min(statistics.median(other.compute_s) for other in found.values() if other.compute_s)
    return compute + (8 * statistics.mean(arm.sent) / bits if bits else 0.0)


class Bench:
    """Orders of one launch of ranks on one network."""

    def __init__(self, options: argparse.Namespace, network: SlowNetwork, ranks: Ranks):
        self.options, self.network, self.ranks = options, network, ranks
        self.settings = arms(options.ranks, options.backend, bool(options.fsdp2))
        model = {"width": options.width, "layers": options.layers, "sequences": options.sequences}
        model |= {"device_ms": options.device_ms}
        bucket = ZERO1["reduce_bucket_size"]
        if options.buckets > 1:
            bucket = 12 * options.layers * options.width**2 // options.buckets
        zero = {**ZERO1, "reduce_bucket_size": bucket, "round_robin_gradients": options.round_robin}
        host = {"reduce_dtype": options.fsdp2} if options.fsdp2 else {"zero": zero}
        answers = ranks.order(do="build", **model, **host)
        self.num_parameters: int = answers[0]
        print(f"{self.num_parameters} parameters, {options.nodes} nodes of {options.ranks} ranks")

    def count_bits(self) -> dict[str, dict[str, float]]:
        """Bits per value that must cross, by arm; also the warm-up of every arm."""
        crossing = self.num_parameters * (self.options.nodes - 1) / self.options.nodes
        found = {}
        parts = ("passes", "step") if self.options.fsdp2 else ("gradients", "weights")
        print(f"\nbits a value that must cross{parts[0]:>12}{parts[1]:>10}   codec: gradients   weights")
        for name in self.settings:
            if name in ("sdp4bit_auto", "sdp4bit_overlap"):
                continue
            answers = self._measure(name, SPLIT_STEPS, split=True)
            places = answers[:: self.options.ranks]
            sent = [statistics.mean(answer["sent"][part] for answer in places) for part in (0, 1)]
            row = dict(zip(("gradients", "weights"), (8 * x / SPLIT_STEPS / crossing for x in sent), strict=True))
            shown = ""
            stats = [answer["stats"] for answer in answers]
            if stats[0] and stats[0]["num_nodes"] == self.options.nodes:
                for what in ("gradient", "weight"):
                    counted = sum(figures[f"{what}_inter_bytes"] for figures in stats) / self.options.nodes
                    row[f"codec_{what}s"] = 8 * counted / SPLIT_STEPS / crossing
                    shown += f"{row[f'codec_{what}s']:16.2f}"
            found[name] = row
            print(f"{name:<28}{row['gradients']:12.2f}{row['weights']:10.2f}{shown}", flush=True)
        return found

    def measure_rate(self, rate: str) -> dict[str, Arm]:
        """All arms at one rate, in turns."""
        self.network.set_rate(rate)
        found = {name: Arm() for name in self.options.arms}
        self._warm_up(rate, found)
        for block in range(self.options.repeats):
            first = block % len(found)
            for name in [*found][first:] + [*found][:first]:
                found[name].add(self._measure(name, self.options.steps, rate), self.options.ranks)
        self.ranks.order(do="check")
        return found

    def _warm_up(self, rate: str, found: dict[str, Arm]) -> None:
        """A step of every arm, in which connections learn the rate, and the choices of `sdp4bit_auto`."""
        for name in found:
            if name == "deepspeed_reduce":
                self._measure(name, 1)
            elif name in HOSTS:
                # Only a handle knows the seconds inside collectives; this one never quantizes.
                observed = {"backend": self.options.backend, "bypass": "never", "start_step": 1_000_000_000}
                found[name].add_seconds(self.ranks.order(do="measure", settings=observed, steps=self.options.steps))
            elif name == "sdp4bit_auto":
                figures = self._measure(name, SETTLING_STEPS, rate)[0]["stats"]
                for what in ("gradients", "weights"):
                    print(f"sdp4bit_auto at {rate}: {figures.get(f'{what}_advice', f'{what}: no choice yet')}")
            else:
                self._measure(name, 1)

    def _measure(self, name: str, steps: int, rate: str = "", split: bool = False) -> list[dict[str, Any]]:
        state = f"{name} {rate}" if name == "sdp4bit_auto" else None
        return self.ranks.order(do="measure", settings=self.settings[name], steps=steps, state=state, split=split)


def show(rate: str, found: dict[str, Arm]) -> None:
    """Print the table of one rate."""
    print(f"\n{rate:<15}   step     p95       blocks         ratio    range        of bf16   wire    compute ", end="")
    print("gradients weights  bound")
    best = incumbent_of(found)
    print(f"the host's best: {best}")
    for name, arm in found.items():
        middle, low, high = ratios(arm, found[best])
        of_bf16 = f"{ratios(arm, found[FAIR])[0]:6.2f}x" if FAIR in found else "      -"
        inside = (
            statistics.median(seconds) if seconds else math.nan
            for seconds in (arm.compute_s, arm.gradients_s, arm.weights_s)
        )
        if name == "sdp4bit_overlap" and "sdp4bit" in found:
            print(f"of the time of the weights hidden: {hidden(arm, found['sdp4bit']):.2f}")
        print(
            f"{name:<15} {arm.p50:7.3f} {arm.p95:7.3f}  {min(arm.medians):6.3f} to {max(arm.medians):6.3f}  "
            f"{middle:6.2f}x ({low:5.2f} to {high:5.2f})  {of_bf16} {statistics.mean(arm.sent) / 1e6:8.3f} "
            + " ".join(f"{seconds:8.3f}" for seconds in inside)
            + f" {bound(arm, rate, found):8.3f}",
            flush=True,
        )


def incumbent_of(found: dict[str, Arm]) -> str:
    """Which of the host's own ways is the faster one here."""
    return min((name for name in HOSTS if name in found), key=lambda name: found[name].p50)


def ratios(arm: Arm, incumbent: Arm) -> tuple[float, float, float]:
    """Median, least and most of the incumbent's time / the arm's, block by block."""
    found = [theirs / ours for theirs, ours in zip(incumbent.medians, arm.medians, strict=True)]
    return statistics.median(found), min(found), max(found)


def hidden(arm: Arm, sync: Arm) -> float:
    """Part of the time of the weights that a step does not wait for: by the shorter steps, block by block."""
    saved = [before - after for before, after in zip(sync.medians, arm.medians, strict=True)]
    return statistics.median(saved) / statistics.median(sync.weights_s)


def rows_of(shape: str, rate: str, found: dict[str, Arm]) -> list[dict[str, Any]]:
    """Results of one rate, `shape` is <nodes>x<ranks>.<buckets>b. `sdp4bit` has the plain names, others add theirs."""
    rows = []
    best = incumbent_of(found)
    incumbent = found[best]
    for name, arm in found.items():
        if name == best:
            continue
        suffix = "" if name == "sdp4bit" else f".{name}"
        middle, low, high = ratios(arm, incumbent)
        shared = {"incumbent": incumbent.p50, "incumbent_arm": best, "ratio": middle, "bound": bound(arm, rate, found)}
        times: dict[str, Any] = {"ratio_range": [low, high], "p95": arm.p95}
        if FAIR in found:
            times["ratio_to_bf16"] = ratios(arm, found[FAIR])[0]
        if name == "sdp4bit_overlap" and "sdp4bit" in found:
            times["hidden"] = hidden(arm, found["sdp4bit"])
        if arm.compute_s:
            times |= {"compute_s": statistics.median(arm.compute_s)}
            times |= {"gradients_s": statistics.median(arm.gradients_s), "weights_s": statistics.median(arm.weights_s)}
        rows.append({"name": f"comm.step_s.{shape}.{rate}{suffix}", "value": arm.p50, "unit": "s", **shared, **times})
        ours, theirs = statistics.mean(arm.sent), statistics.mean(incumbent.sent)
        row = {"name": f"comm.wire_bytes.{shape}.{rate}{suffix}", "value": ours, "unit": "bytes a node and step"}
        rows.append({**row, "incumbent": theirs, "ratio": theirs / ours, "bound": None})
    return rows


def bit_rows(bits: dict[str, dict[str, float]], num_parameters: int, nodes: int) -> list[dict[str, Any]]:
    """Bits a value by arm, and all bytes of a step without a limit."""
    rows = []
    scale = num_parameters * (nodes - 1) / nodes / 8
    total = {name: (row["gradients"] + row["weights"]) * scale for name, row in bits.items()}
    host = next(name for name in HOSTS if name in bits)
    for name, row in bits.items():
        if name == host:
            continue
        suffix = "" if name == "sdp4bit" else f".{name}"
        ratio = total[host] / total[name]
        values = {"value": total[name], "unit": "bytes a node and step", "incumbent": total[host]}
        rows.append({"name": f"comm.wire_bytes{suffix}", **values, "ratio": ratio, "bound": None})
        if host == "fsdp2":
            continue
        for what in ("gradients", "weights"):
            value, theirs = row[what], bits[host][what]
            values = {"value": value, "unit": "bits a value that crosses", "incumbent": theirs, "ratio": theirs / value}
            rows.append({"name": f"comm.wire_bits.{what}{suffix}", **values, "bound": row.get(f"codec_{what}")})
    return rows


def bench(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    with (
        SlowNetwork(options.nodes) as network,
        Ranks([RANK], options.nodes, options.ranks, network) as ranks,
    ):
        measured = Bench(options, network, ranks)
        rows += bit_rows(measured.count_bits(), measured.num_parameters, options.nodes)
        for rate in options.rate:
            found = measured.measure_rate(rate)
            show(rate, found)
            shape = f"{options.nodes}x{options.ranks}.{options.buckets}b" + (".fsdp2" if options.fsdp2 else "")
            geometry = {name: getattr(options, name) for name in ("width", "layers", "sequences", "device_ms")}
            geometry |= {"reduce_dtype": options.fsdp2} if options.fsdp2 else {}
            rows += [{**row, **geometry} for row in rows_of(shape, rate, found)]
    return rows


def bench_stages(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Memory and bytes of ZeRO-2 and ZeRO-3."""
    settings = arms(options.ranks, options.backend)
    common = settings["sdp4bit"]
    assert common is not None
    width, layers = 2 * options.width, 2 * options.layers
    num_parameters = layers * 12 * width * width
    bucket = {"reduce_bucket_size": num_parameters // 8}
    limits = {"stage3_max_live_parameters": num_parameters // 10, "stage3_max_reuse_distance": 0}
    limits |= {"stage3_prefetch_bucket_size": num_parameters // 20, "stage3_param_persistence_threshold": 4 * width}
    zero2, zero3 = {"stage": 2, **bucket}, {"stage": 3, **bucket, **limits}
    contenders = {
        "zero2": (zero2, None),
        "zero2.sdp4bit": (zero2, settings["sdp4bit"]),
        "zero3": (zero3, None),
        "zero3.gradients_only": (zero3, settings["gradients_only"]),
        "zero3.sdp4bit": (zero3, settings["sdp4bit"]),
        "zero2.sdp4bit.small_buffers": (zero2, {**common, "max_buffer_mib": 2}),
    }
    found: dict[str, dict[str, float]] = {}
    env = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed tensors leave the process at once
    with (
        SlowNetwork(options.nodes) as network,
        Ranks([RANK], options.nodes, options.ranks, network, env) as ranks,
    ):
        for zero, arm in contenders.values():  # loads what each stage loads late
            ranks.order(do="measure_memory", width=64, layers=1, zero=zero, settings=arm, steps=1)
        for name, (zero, arm) in contenders.items():
            order = {"width": width, "layers": layers, "zero": zero, "settings": arm, "steps": options.steps}
            answers = ranks.order(do="measure_memory", **order)
            size = 2 * answers[0]["parameters"]
            if not found:
                print(f"{size // 2} parameters; a bfloat16 copy of the weights takes {size / 2**20:.1f} MiB")
            sent = statistics.mean(answer["sent"] for answer in answers[:: options.ranks]) / options.steps
            peak = max(answer["peak_bytes"] for answer in answers)
            found[name] = {"sent": sent, "peak": peak}
            print(f"{name:<28} peak of a rank {peak / 2**20:8.1f} MiB   wire {sent / 1e6:8.3f} MB a node and step")
    rows = []
    for name, row in found.items():
        for what, unit in (("peak", "bytes a rank"), ("sent", "bytes a node and step")):
            theirs = found["zero3"][what]
            values = {"value": row[what], "unit": unit, "incumbent": theirs, "ratio": theirs / row[what], "bound": None}
            rows.append({"name": f"comm.stages.{what}.{name}", **values})
    return rows


def read_options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=2, help="at least 2")
    parser.add_argument("--ranks", type=int, default=2, help="a node")
    parser.add_argument("--rate", default="25mbit,100mbit,1gbit,none", help="of every link, both ways")
    parser.add_argument("--steps", type=int, default=3, help="an arm and block")
    parser.add_argument("--repeats", type=int, default=5, help="blocks a rate")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--arms", help=f"which to time, the host alone among them; default {','.join(TIMED)}")
    parser.add_argument("--sequences", type=int, default=1, help="a step and rank: more computation")
    parser.add_argument("--device-ms", type=float, default=0.0, help="a layer's forward pass waits so long")
    parser.add_argument("--fsdp2", choices=("float32", "bfloat16"), help="FSDP2 with this dtype of reduction")
    parser.add_argument("--buckets", type=int, default=1, help="of gradients")
    parser.add_argument("--round-robin", action="store_true", help="switch round_robin_gradients on")
    parser.add_argument("--backend", default="auto", help="of the codec: auto, torch or cpp")
    parser.add_argument("--stages", action="store_true", help="memory and bytes of ZeRO-2 and ZeRO-3 instead")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--json", type=Path, help="write the results as a list of {name, value, unit, ...}")
    options = parser.parse_args(argv)
    options.rate = options.rate.split(",")
    options.arms = options.arms.split(",") if options.arms else [*(TIMED_FSDP2 if options.fsdp2 else TIMED)]
    host = "fsdp2" if options.fsdp2 else "deepspeed"
    unknown = set(options.arms) - set(arms(options.ranks, options.backend, bool(options.fsdp2)))
    if unknown or host not in options.arms:
        parser.error(f"--arms must hold {host} and known arms; unknown: {', '.join(sorted(unknown)) or 'none'}")
    if options.nodes < 2 or options.ranks < 1:
        parser.error("--nodes must be at least 2 and --ranks at least 1")
    if options.buckets < 1:
        parser.error("--buckets must be at least 1")
    if options.steps < 1 or options.repeats < 1:
        parser.error("--steps and --repeats must be at least 1")
    try:
        for rate in options.rate:
            bits_per_second(rate)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(argv: list[str]) -> int:
    options = read_options(argv)
    try:
        check_machine()
    except NetworkError as error:
        print(f"bench_comm: {error}", file=sys.stderr)
        return 2
    end_in_order()
    processes.start_reaper(processes.mark_children())
    print(f"{Path(sys.argv[0]).name} {' '.join(argv)}\n{machine.describe()}\n{versions.report()}", flush=True)
    if not options.skip_tests:
        subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/comm"], cwd=SCRIPTS.parent, check=True)
    try:
        rows = bench_stages(options) if options.stages else bench(options)
    except (NetworkError, RankError) as error:
        print(f"bench_comm: {error}", file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
