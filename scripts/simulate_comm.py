"""What 4-bit communication would give on GPU clusters of 8 to 1,024 GPUs: a model, not a measurement.

    python scripts/simulate_comm.py [--model 7b 13b 70b] [--gpus 8 16 64 256 1024] [--gbit 25 100 400 3200]
        [--tokens 8192] [--mfu 0.4] [--ranks 8] [--intra-gb 300] [--bench FILE ...] [--json FILE] [--plot FILE]

The model is comm_model.py (collectives) and comm_step.py (overlap); before it predicts, it is checked against the
steps that bench_comm.py measured (comm_bench_model.py) and SDP4Bit's published throughput (comm_paper_model.py).
`--bench` adds files of bench_comm.py whose rows name nodes, ranks and buckets.

    comm_sim.<model>.<gpus>.<gbit>gbit.<way>.step_s   predicted; incumbent: DeepSpeed's default, or for FSDP the faster
                                                      of fsdp and hsdp that fits; bound: compute alone
    comm_sim.<model>.<gpus>.small_gain                Gbit/s a node from which on a step gains less than 5 %
    comm_check.bench.<row>, comm_check.paper.<row>    predicted, with what was measured or published and the error

7B and 13B as ZeRO-1 (gradients overlap backward) and FSDP2, 70B as FSDP2 only, which fits. `sdp4bit` has both
collectives quantized, `sdp4bit_auto` what `bypass=auto` would choose, `sdp4bit_overlap` its weights beside the next
forward. Every GPU prediction rests on assumed rates: 85 % of the link, NVLink and codec as the options say.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import comm_bench_model as bench
import comm_paper_model as paper
from comm_model import Cluster, Workload
from comm_step import FSDP_WAYS, Step, auto_step, choices, fsdp_step, memory_bytes, zero_step

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
MODELS = {"7b": (7.62e9, 28), "13b": (13.0e9, 40), "70b": (70.6e9, 80)}
"""Parameters and layers: Qwen2.5-7B, Llama-2-13B, Llama-3.1-70B."""
ZERO_WAYS = (
    "deepspeed",
    "megatron",
    "zeropp",
    "sdp4bit_incast",
    "sdp4bit_relay",
    "sdp4bit_spread",
    "sdp4bit",
    "sdp4bit_overlap",
    "sdp4bit_auto",
)
ZERO_MODELS = ("7b", "13b")
SMALL_GAIN = 1.05


def cluster_of(options: argparse.Namespace, gpus: int, gbit: float) -> Cluster:
    return Cluster(
        nodes=max(1, gpus // options.ranks),
        ranks=min(gpus, options.ranks),
        inter=gbit * 1e9 / 8,
        intra=options.intra_gb * 1e9,
        inter_latency=options.latency_us * 1e-6,
        ring_share=options.share,
        mesh_share=options.share,
        codec=options.codec_gb * 1e9,
    )


def work_of(options: argparse.Namespace, model: str) -> Workload:
    parameters, layers = MODELS[model]
    return Workload(
        parameters,
        tokens=options.tokens,
        peak=options.peak * 1e12,
        mfu=options.mfu,
        layers=layers,
        micro_batches=options.micro_batches,
    )


def step_of_way(way: str, cluster: Cluster, work: Workload) -> Step:
    if way in FSDP_WAYS:
        return fsdp_step(way, cluster, work)
    if way == "sdp4bit_auto":
        return auto_step(cluster, work)
    if way == "sdp4bit_overlap":
        return zero_step("sdp4bit", cluster, replace(work, overlap_weights=True))
    return zero_step(way, cluster, work)


def advice(cluster: Cluster, work: Workload) -> dict[str, str]:
    """Return what `bypass=auto` would choose."""
    chosen = choices(cluster, work)
    return {what: "quantized" if quantized else "plain" for what, quantized in chosen.items()}


def predict(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for model, gbit, gpus in product(options.model, options.gbit, options.gpus):
        cluster, work = cluster_of(options, gpus, gbit), work_of(options, model)
        families: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
        if model in ZERO_MODELS:
            families.append((ZERO_WAYS, ("deepspeed",)))
        families.append((FSDP_WAYS, ("fsdp", "hsdp")))
        for ways, plain in families:
            steps = {way: step_of_way(way, cluster, work) for way in ways}
            memory = {way: memory_bytes(way, cluster, work.parameters) / 1e9 for way in ways}
            fitting = [way for way in plain if memory[way] <= options.memory_gb] or [plain[0]]
            incumbent = min(fitting, key=lambda way: steps[way].step_s)
            for way, step in steps.items():
                row = {
                    "name": f"comm_sim.{model}.{gpus}.{gbit:g}gbit.{way}.step_s",
                    "value": step.step_s,
                    "unit": "s, predicted",
                    "incumbent": steps[incumbent].step_s,
                    "ratio": steps[incumbent].step_s / step.step_s,
                    "bound": step.compute_s,
                    "incumbent_arm": incumbent,
                    "tflops": 6 * work.parameters * work.tokens / step.step_s / 1e12,
                    "gradients_s": step.gradients_s,
                    "weights_s": step.weights_s,
                    "memory_gb": memory[way],
                    "fits": memory[way] <= options.memory_gb,
                }
                if way == "sdp4bit_auto":
                    row["bypass"] = advice(cluster, work)
                rows.append(row)
    return rows


def small_gain_gbit(options: argparse.Namespace, model: str, gpus: int) -> float:
    """Return the rate of a node's link from which on ours gains less than `SMALL_GAIN`, by bisection."""
    work, (plain, ours) = work_of(options, model), ("deepspeed", "sdp4bit")
    if model not in ZERO_MODELS:
        plain, ours = "fsdp", "fsdp_sdp4bit"
    low, high = 1.0, 1e5
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        cluster = cluster_of(options, gpus, middle)
        gain = step_of_way(plain, cluster, work).step_s / step_of_way(ours, cluster, work).step_s
        if gain > SMALL_GAIN:
            low = middle
        else:
            high = middle
    return high


def show_small_gain(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    print("\npredicted Gbit/s a node from which on a step gains less than 5 %")
    for model in options.model:
        found = {gpus: small_gain_gbit(options, model, gpus) for gpus in options.gpus if gpus > options.ranks}
        print(f"{model:>6}  " + ", ".join(f"{gpus} GPUs {gbit:.0f}" for gpus, gbit in found.items()))
        for gpus, gbit in found.items():
            row = {"name": f"comm_sim.{model}.{gpus}.small_gain", "value": gbit, "unit": "Gbit/s a node, predicted"}
            rows.append({**row, "incumbent": None, "ratio": None, "bound": None})
    return rows


def check_bench(paths: list[Path], width: int) -> list[dict[str, Any]]:
    """Return predicted and measured steps of the committed benches and of other files."""
    machine, rows = bench.Machine(), []
    for path in [RESULTS / name for name in (*bench.GEOMETRY, *bench.BALANCED)] + paths:
        for measured in bench.read(path, width):
            predicted = bench.predicted_s(measured, machine)
            gradients, weights = bench.parts_s(measured, machine)
            rows.append(
                _check(f"comm_check.bench.{measured.name}", predicted, measured.step_s, "s, predicted")
                | {"fitted": path.name in bench.FITTED_ON, "gradients_s": gradients, "weights_s": weights}
                | {"measured_gradients_s": measured.gradients_s, "measured_weights_s": measured.weights_s}
            )
    return rows


def check_paper() -> list[dict[str, Any]]:
    """Return predicted and published TFLOPs of SDP4Bit."""
    rates, rows = paper.rates(), []
    for row in paper.ROWS:
        predicted = paper.sdp4bit_tflops(row, rates[row.link])
        shown = _check(f"comm_check.paper.{row.machine}.{row.model}", predicted, row.sdp4bit, "TFLOPs a GPU, predicted")
        rows.append(shown | {"fitted": paper.FIT[row.link] == row.model, "baseline": row.baseline})
    return rows


def _check(name: str, predicted: float, measured: float, unit: str) -> dict[str, Any]:
    row = {"name": name, "value": predicted, "unit": unit, "incumbent": None, "ratio": None, "bound": None}
    return row | {"measured": measured, "error": predicted / measured - 1}


def show_checks(title: str, rows: list[dict[str, Any]], limit: float) -> None:
    print(f"\n{title}\n{'':<72} predicted  measured   error")
    for row in rows:
        mark = "fitted" if row["fitted"] else "beyond the target" if abs(row["error"]) > limit else ""
        name = row["name"].split(".", 2)[2]
        print(f"{name:<72} {row['value']:9.3f} {row['measured']:9.3f} {row['error']:+7.1%} {mark}")
    for name, some in (("fitted", True), ("judged", False)):
        errors = [abs(row["error"]) for row in rows if row["fitted"] == some]
        beyond = sum(error > limit for error in errors)
        print(
            f"{name}: {len(errors)} rows, median error {statistics.median(errors):.1%}, largest {max(errors):.1%}, "
            f"{beyond} beyond {limit:.0%}"
        )


def show_predictions(rows: list[dict[str, Any]]) -> None:
    """Print a line of each setting: seconds and, of the other ways, times as fast as the incumbent."""
    settings: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        _, model, gpus, gbit, way, _ = row["name"].split(".")
        family = "fsdp" if way in FSDP_WAYS else "zero"
        settings.setdefault((family, model, gpus, gbit), {})[way] = row
    before = None
    order = sorted(settings, key=lambda setting: (setting[0] == "fsdp", list(settings).index(setting)))
    for family, model, gpus, gbit in order:
        ways = settings[family, model, gpus, gbit]
        if (family, model, gbit) != before:
            print(f"\npredicted, {model}, {gbit} a node, {'FSDP2' if family == 'fsdp' else 'ZeRO-1'}")
            print(
                "  GPUs compute plain, s  TFLOPs  " + " ".join(f"{way:>15}" for way in ways) + "   bypass would choose"
            )
            before = family, model, gbit
        first = next(iter(ways.values()))
        plain = ways[first["incumbent_arm"]]
        shown = " ".join(f"{row['ratio']:14.2f}{' ' if row['fits'] else '!'}" for row in ways.values())
        chosen = ways["sdp4bit_auto"]["bypass"] if "sdp4bit_auto" in ways else {}
        said = ", ".join(f"{choice} {what}" for what, choice in chosen.items())
        if ways.get("sdp4bit", ways.get("fsdp_sdp4bit", first))["ratio"] < 1:
            said += "; a plain step is faster" if said else "a plain step is faster"
        print(f"{gpus:>6} {first['bound']:7.2f} {plain['value']:8.2f} {plain['tflops']:7.0f}  {shown}   {said}")
    print("columns of ways: times as fast as plain; !: weights, gradients and optimizer exceed --memory-gb")


def draw(path: Path, predictions: list[dict[str, Any]], benches: list[dict[str, Any]], published: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(2, 3, figsize=(15, 8))
    values = {row["name"]: row for row in predictions}
    parts = [name.split(".") for name in values]
    models, gpus, gbits = ([*dict.fromkeys(part[index] for part in parts)] for index in (1, 2, 3))
    for axes, model in zip(all_axes[0], models, strict=False):
        way = "sdp4bit_auto" if model in ZERO_MODELS else "fsdp_sdp4bit"
        for gbit in gbits:
            ratios = [values[f"comm_sim.{model}.{count}.{gbit}.{way}.step_s"]["ratio"] for count in gpus]
            axes.plot(
                [int(count) for count in gpus], ratios, marker="o", label=f"{gbit.removesuffix('gbit')} Gbit/s a node"
            )
        what = "ZeRO-1, DeepSpeed's default" if model in ZERO_MODELS else "FSDP2, the faster of fsdp and hsdp"
        axes.set_title(f"{model}: predicted, times as fast as {what}", fontsize=9)
        _gpu_axis(axes, gpus, "times as fast")
    axes = all_axes[1][0]
    for way in ("deepspeed", "sdp4bit_incast", "sdp4bit_relay", "sdp4bit_spread", "sdp4bit"):
        found = [values.get(f"comm_sim.{models[0]}.{count}.{gbits[0]}.{way}.step_s") for count in gpus]
        if all(found):
            axes.plot([int(count) for count in gpus], [row["value"] for row in found if row], marker="o", label=way)
    axes.set_title(f"{models[0]}, {gbits[0]}: predicted step, s, by where buckets go", fontsize=9)
    axes.set_yscale("log")
    _gpu_axis(axes, gpus, "s")
    _scatter(all_axes[1][1], benches, 0.15, "bench_comm.py: step, s")
    _scatter(all_axes[1][2], published, 0.10, "SDP4Bit as published: TFLOPs a GPU")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def _gpu_axis(axes: Any, gpus: list[str], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks([int(count) for count in gpus], gpus)
    axes.set_xlabel("GPUs")
    axes.set_ylabel(label)
    axes.legend(fontsize=8, loc="upper right" if label != "s" else "lower right")
    axes.grid(alpha=0.3)


def _scatter(axes: Any, rows: list[dict[str, Any]], band: float, title: str) -> None:
    for fitted, colour in ((True, "tab:gray"), (False, "tab:blue")):
        some = [row for row in rows if row["fitted"] == fitted]
        label = "fitted on" if fitted else "judged"
        axes.loglog([row["measured"] for row in some], [row["value"] for row in some], ".", color=colour, label=label)
    ends = [min(row["measured"] for row in rows), max(row["measured"] for row in rows)]
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.fill_between(ends, [end * (1 - band) for end in ends], [end * (1 + band) for end in ends], alpha=0.15)
    axes.set_title(f"{title} (band: {band:.0%})", fontsize=9)
    axes.set_xlabel("measured")
    axes.set_ylabel("predicted")
    axes.legend(fontsize=8, loc="upper left")


def read_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--gpus", nargs="*", type=int, default=[8, 16, 64, 256, 1024])
    parser.add_argument(
        "--gbit", nargs="*", type=float, default=[25, 100, 400, 3200], help="of a node's link, each way"
    )
    parser.add_argument("--ranks", type=int, default=8, help="GPUs a node")
    parser.add_argument("--latency-us", type=float, default=10.0, help="of a message between nodes")
    parser.add_argument("--share", type=float, default=0.85, help="of a node's link that collectives reach")
    parser.add_argument("--intra-gb", type=float, default=300.0, help="GB/s of a GPU inside its node")
    parser.add_argument("--codec-gb", type=float, default=1500.0, help="GB/s that the codec reads and writes")
    parser.add_argument("--tokens", type=float, default=8192, help="of a GPU and optimizer step")
    parser.add_argument("--micro-batches", type=int, default=1, help="of a step")
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOPs of a GPU")
    parser.add_argument("--mfu", type=float, default=0.4, help="of the peak, without communication")
    parser.add_argument("--memory-gb", type=float, default=80.0, help="of a GPU")
    parser.add_argument(
        "--bench", nargs="*", type=Path, default=[], help="more results of bench_comm.py to check against"
    )
    parser.add_argument("--bench-width", type=int, default=128, help="--width of these")
    parser.add_argument("--json", type=Path, help="write the results as a list of {name, value, unit, ...}")
    parser.add_argument("--plot", type=Path, help="draw them into this PNG")
    options = parser.parse_args(argv)
    if any(count > options.ranks and count % options.ranks for count in options.gpus):
        parser.error("--gpus must be whole nodes of --ranks")
    return options


def main(argv: list[str] | None = None) -> None:
    options = read_options(argv)
    benches, published = check_bench(options.bench, options.bench_width), check_paper()
    show_checks(f"steps of bench_comm.py, s; {bench.Machine()}", benches, 0.15)
    rates = ", ".join(f"{link} {rate * 8 / 1e9:.0f} Gbit/s a node" for link, rate in paper.rates().items())
    show_checks(f"SDP4Bit as published, TFLOPs a GPU; fitted: {rates}", published, 0.10)
    predictions = predict(options)
    show_predictions(predictions)
    ends = show_small_gain(options)
    if options.json:
        conditions = {key: value for key, value in vars(options).items() if key not in ("json", "plot", "bench")}
        conditions |= {"bench_constants": vars(bench.Machine()), "paper_rates": paper.rates(), "paper": paper.SOURCE}
        head = {"name": "comm_sim.conditions", "value": None, "model": "alpha-beta, predicted", **conditions}
        lines = ",\n ".join(json.dumps(_rounded(row)) for row in [head, *benches, *published, *predictions, *ends])
        options.json.write_text(f"[{lines}]\n")
    if options.plot:
        draw(options.plot, predictions, benches, published)


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}


if __name__ == "__main__":
    main()
