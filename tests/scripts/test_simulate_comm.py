"""The model of 4-bit communication: against figures worked out by hand, against what was measured and published, and
against the rules and the layouts of the code that it is a model of."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from rl_accel.comm.bypass import TRIES, Bypass
from rl_accel.quickstart.tiny_gpt import TinyGPT

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
RESULTS = ROOT / "docs" / "results"


@pytest.fixture(scope="module")
def modules():
    """The scripts by name; they import each other as scripts do."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        names = ("comm_model", "comm_step", "comm_bench_model", "comm_paper_model", "simulate_comm")
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def model(modules):
    return modules["comm_model"]


def ideal(model, **changes):
    """A cluster that costs nothing but bytes between nodes, 1 GB/s."""
    free = {"inter_latency": 0.0, "intra_latency": 0.0, "ring_share": 1.0, "mesh_share": 1.0, "launch": 0.0}
    rates = {"nodes": 4, "ranks": 2, "inter": 1e9, "intra": math.inf, "codec": math.inf}
    return model.Cluster(**{**rates, **free, **changes})


def test_bytes_between_nodes_by_hand(model) -> None:
    cluster, work = ideal(model), model.Workload(1e9)
    by_hand = {  # seconds of gradients and weights: 4 nodes of 2 ranks, 10^9 parameters, 1 GB/s
        "deepspeed": (2 * 7 / 8 * 2, 7 / 8 * 2),
        "megatron": (7 / 8 * 4, 7 / 8 * 2),
        "bf16": (2 * 6 / 8 * 2, 7 / 8 * 2),
        "bf16_two_level": (3 / 4 * 2, 3 / 4 * 2),
        "sdp4bit": (3 / 4 * 4.25 / 8, 3 / 4 * 4.25 / 8),
        "sdp4bit_spread": (3 / 4 * 4.25 / 8 + 3 / 4 * 8.25 / 8 / 4, 3 / 4 * 4.25 / 8),
        "sdp4bit_paper": (3 / 4 * 4.25 / 8, 7 / 8 * (4 + 32 / 2048) / 8),
    }
    for way, (gradients, weights) in by_hand.items():
        plan = model.WAYS[way](cluster, work)
        assert plan.gradients_s(cluster) == pytest.approx(gradients), way
        assert plan.weights_s(cluster) == pytest.approx(weights), way


def test_one_node_and_one_rank_a_node(model) -> None:
    work = model.Workload(1e9)
    for shape in ({"nodes": 1, "ranks": 8}, {"nodes": 8, "ranks": 1}):
        cluster = ideal(model, **shape)
        for way, make in model.WAYS.items():
            plan = make(cluster, work)
            seconds = plan.gradients_s(cluster) + plan.weights_s(cluster)
            assert (seconds == 0) == (shape["nodes"] == 1), way


def test_latency_codec_and_the_slower_link(model) -> None:
    phase = model.Phase(inter=3e9, intra=8e9, messages=3, intra_messages=2, codec=1e9, launches=4)
    cluster = ideal(model, intra=4e9, inter_latency=0.1, intra_latency=0.01, codec=2e9, launch=0.001, burst=1e9)
    assert phase.seconds(cluster) == pytest.approx(2 + 0.32 + 0.5 + 0.004)


def test_a_bucket_of_one_owner_loads_its_link(model) -> None:
    """Eight buckets of eight nodes: all others send a whole bucket to one node, where a balanced exchange sends 1/8."""
    cluster = ideal(model, nodes=8, ranks=1)
    work = model.Workload(8e8, bucket=1e8)
    incast, queue = (model.WAYS[way](cluster, work).gradients_s(cluster) for way in ("sdp4bit_incast", "sdp4bit"))
    assert incast == pytest.approx(8 * 7 * 0.1 * 4.25 / 8)
    assert incast / queue == pytest.approx(8)
    assert model.owned((10, 10, 10), 2) == [{1: 10}, {0: 5, 1: 5}, {0: 10}]


def test_overlap(modules, model) -> None:
    step = modules["comm_step"]
    assert step.in_turn([1, 2, 3], [0.5, 0.5, 0.5]) == 3.5
    assert step.in_turn([1, 2, 3], [3, 3, 3]) == 10
    cluster = ideal(model)
    work = model.Workload(1e9, bucket=1e8, compute_s=30.0)
    plain = step.zero_step("deepspeed", cluster, work)
    assert plain.exposed_s == pytest.approx(3.5 / 10 + 1.75), "the last bucket and the weights"
    serial = step.zero_step("deepspeed", cluster, model.Workload(1e9, compute_s=30.0, overlap_gradients=False))
    assert serial.exposed_s == pytest.approx(5.25)
    queue = step.zero_step("sdp4bit", cluster, work)
    assert queue.exposed_s == pytest.approx(queue.gradients_s + queue.weights_s), (
        "the exchange waits for the last bucket"
    )
    beside = model.Workload(1e9, compute_s=30.0, overlap_weights=True, max_buffer_mib=64)
    hidden = step.zero_step("sdp4bit", cluster, beside)
    chunks = len(model.WAYS["sdp4bit"](cluster, beside).weights)
    assert chunks == 8 and hidden.exposed_s == pytest.approx(hidden.gradients_s + hidden.weights_s / chunks)


def test_fsdp_by_hand(modules, model) -> None:
    step, cluster = modules["comm_step"], ideal(model)
    work = model.Workload(1e9, compute_s=0.0, layers=1_000_000_000, micro_batches=2)
    plain = step.fsdp_step("fsdp", cluster, work)
    assert plain.step_s == pytest.approx(2 * (2 * 7 / 8 * 2 + 7 / 8 * 4))
    ours = step.fsdp_step("fsdp_sdp4bit", cluster, work)
    assert ours.step_s == pytest.approx((1 + 2) * 3 / 4 * 4.25 / 8), "differences once, gradients of both micro-batches"
    with pytest.raises(ValueError, match="ways of FSDP"):
        step.fsdp_step("zero", cluster, work)


def test_the_choice_is_the_rule_of_the_bypass(modules, model, tmp_path: Path) -> None:
    """`Bypass` itself decides from the predicted seconds, in a group of one rank."""
    step = modules["comm_step"]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        seen = set()
        for gbit, codec in ((25, 1e12), (3200, 1e12), (3200, 1e11), (1e5, 5e11)):
            cluster = ideal(model, nodes=16, ranks=8, inter=gbit * 1e9 / 8, intra=300e9, codec=codec)
            work = model.Workload(7e9)
            chosen = step.choices(cluster, work)
            plans = {way: model.WAYS[way](cluster, work) for way in ("sdp4bit", "deepspeed")}
            for what in step.WHATS:
                seconds = {way: getattr(plan, f"{what}_s")(cluster) for way, plan in plans.items()}
                bypass = Bypass()
                while not (bypass.quantized_s and bypass.plain_s):
                    bypass.end_step(seconds["sdp4bit" if bypass.quantized else "deepspeed"], dist.group.WORLD)
                    assert bypass.step < 20 * TRIES
                assert chosen[what] == bypass.kept, (gbit, codec, what)
                seen.add(chosen[what])
        assert seen == {True, False}
        assert step.quantized_is_chosen(1.0, 1.0) and not step.quantized_is_chosen(1.1, 1.0)
    finally:
        dist.destroy_process_group()


def test_parameters_and_buckets_of_the_bench(modules) -> None:
    bench = modules["comm_bench_model"]
    sizes = bench.parameter_sizes(32, layers=2)
    assert sizes == [weight.numel() for weight in TinyGPT(32, 2, length=32).parameters()]
    assert sum(bench.parameter_sizes(256)) == 3_196_416, "what bench_comm.py says of its default"
    assert bench.bucket_sizes([4, 3, 9, 1, 2], 4) == (3, 9, 3, 4)
    assert bench.bucket_sizes([4, 3, 9], math.inf) == (16,)


def test_constants_are_those_of_the_fit(modules) -> None:
    bench = modules["comm_bench_model"]
    rows = [row for name in bench.FITTED_ON for row in bench.read(RESULTS / name)]
    fitted = bench.fit(rows, bench.Machine(0.8, 0.8, 1e9, 3e9, 1e-3))
    for name, value in vars(bench.Machine()).items():
        assert getattr(fitted, name) == pytest.approx(value, rel=0.02), name


def test_measured_and_published_rows(modules) -> None:
    simulate = modules["simulate_comm"]
    benches, published = simulate.check_bench([], 128), simulate.check_paper()
    assert len(benches) == 67 and len(published) == 10
    free = [row for row in benches if ".none." in row["name"]]
    limited = [row for row in benches if row not in free]
    assert len(limited) > 3 * len(free) > 0
    for rows, limit, beyond, worst in ((limited, 0.15, 5, 0.22), (free, 0.15, 3, 0.26), (published, 0.10, 0, 0.09)):
        errors = [abs(row["error"]) for row in rows]
        assert max(errors) < worst and sum(error > limit for error in errors) <= beyond


def test_rows_of_a_new_bench(modules, tmp_path: Path) -> None:
    bench = modules["comm_bench_model"]
    path = tmp_path / "queue.json"
    times = {"compute_s": 0.2, "gradients_s": 0.3, "weights_s": 0.1}
    row = {"name": "comm.step_s.6x1.8b.25mbit", "value": 0.6, "incumbent": 1.6, "incumbent_arm": "deepspeed", **times}
    auto = {**row, "name": "comm.step_s.6x1.8b.25mbit.sdp4bit_auto", "compute_s": 0.15}
    path.write_text(json.dumps([row, auto, {"name": "comm.wire_bytes.6x1.8b.25mbit", "value": 1}]))
    found = {row.arm: row for row in bench.read(path)}
    assert {arm: row.way for arm, row in found.items()} == {
        "sdp4bit": "sdp4bit",
        "deepspeed": "deepspeed",
    }, "what was chosen is not in the row"
    assert {row.compute_s for row in found.values()} == {0.15}, "the least at this rate, also of the incumbent"
    before = next(row for row in bench.read(RESULTS / "comm-buckets-6x8-cpu.json") if row.arm == "sdp4bit")
    ours, theirs = (bench.parts_s(row, bench.Machine())[0] for row in (found["sdp4bit"], before))
    assert ours < theirs / 2, "one balanced exchange against buckets that go to their owners"
    path.write_text(json.dumps([{**row, "name": "comm.step_s.25mbit"}]))
    with pytest.raises(ValueError, match="does not say nodes"):
        bench.read(path)


def test_rows_and_plot(tmp_path: Path) -> None:
    result, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    options = ["--model", "7b", "70b", "--gpus", "8", "64", "--gbit", "25", "3200", "--json", result, "--plot", plot]
    done = subprocess.run([sys.executable, SCRIPTS / "simulate_comm.py", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bypass would choose" in done.stdout and "a plain step is faster" in done.stdout
    rows = {row["name"]: row for row in json.loads(result.read_text())}
    assert rows.pop("comm_sim.conditions")["tokens"] == 8192
    assert all("predicted" in row["unit"] for row in rows.values())
    ours = rows["comm_sim.7b.64.25gbit.sdp4bit_auto.step_s"]
    assert ours["ratio"] > 3 and ours["bypass"] == {"gradients": "quantized", "weights": "quantized"}
    assert rows["comm_sim.7b.64.25gbit.deepspeed.step_s"]["ratio"] == 1.0
    assert 0.9 < rows["comm_sim.7b.64.3200gbit.sdp4bit.step_s"]["ratio"] < 1.05
    assert not any(".70b." in name and ".deepspeed." in name for name in rows), "ZeRO-1 has no memory for 70B"
    assert plot.read_bytes().startswith(b"\x89PNG")
