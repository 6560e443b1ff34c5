"""GRPO over two Ray nodes with a slow network between them, on one machine: does all of it work there, and what does
4-bit communication save? Needs Linux, root, iproute2 and util-linux, and about 9 GB of free memory.

    sudo .venv/bin/python scripts/two_nodes.py --out recipes/gsm8k_grpo/results/two_nodes

Each arm is `python -m rl_accel.train recipe=gsm8k_grpo/cpu_nodes` on a cluster of its own (`ray_nodes.py`): a training
rank and a rollout engine on either node, drafts by `das`, and the run folder hidden from the second node. Every run is
checked: ranks and engines of both nodes worked; engines took each other's history; 4-bit communication saw two nodes;
what it says it sent crossed the interface; the second node wrote nothing into the run folder. A check that fails is
printed, and the exit code is 1.

Bytes are those that the nodes' interfaces counted from one line of metrics to the next, so those of Ray and of rollout
data are in them. Not covered: GPUs, NCCL, latency, a node that is lost, checkpoints (all nodes must see their folder).
Both nodes share the cores, so step times say what the network costs and nothing else.
"""

from __future__ import annotations

import argparse
import getpass
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from comm_ranks import end_in_order
from omegaconf import OmegaConf
from ray_nodes import RayNodes
from slow_network import NetworkError

ROOT = Path(__file__).resolve().parents[1]
COMM = ("rl_accel.comm.enable=true", "rl_accel.allow_lossy=true", "rl_accel.comm.bypass=never")
DEEPSPEED = ("trainer=deepspeed", "rl_accel.deepspeed.zero_stage=1")
ARMS = {
    "deepspeed": DEEPSPEED,
    "deepspeed_comm": (*DEEPSPEED, *COMM, "rl_accel.comm.check_every=1"),
    "fsdp2": (),
    "fsdp2_comm": (*COMM, "rl_accel.comm.sharded_weights=true"),
}
COMMON = (
    "rl_accel.draft.method=das",
    "rl_accel.sync.readback=every",
    "data.train_size=32",  # two steps an epoch, so that history is of use
    "data.val_size=16",
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
    "trainer.save_freq=-1",
    "trainer.logger=[file]",
)
NUM_NODES = 2
ACTORS = ("WorkerDict", "vLLMHttpServer")
"""verl's training ranks and rollout engines, as Ray calls their processes."""
POLL_S = 0.05


def main(argv: list[str] | None = None) -> int:
    """Run the arms and compare them; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default=",".join(ARMS), help=f"of {', '.join(ARMS)} (default: all)")
    parser.add_argument("--steps", type=int, default=8, help="GRPO steps of an arm (default: %(default)s)")
    parser.add_argument("--rate", default="100mbit", help="of each link, or none (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs/two_nodes", help="folder of the runs, made anew")
    parser.add_argument("--out", type=Path, help="folder for two_nodes.md and .json, and comparisons")
    parser.add_argument("overrides", nargs="*", help="further settings of every arm")
    options = parser.parse_args(argv)
    unknown = [arm for arm in options.arms.split(",") if arm not in ARMS]
    if unknown:
        parser.error(f"--arms: {', '.join(unknown)} unknown; choose of {', '.join(ARMS)}")
    end_in_order()
    runs = options.runs.resolve()
    shutil.rmtree(runs, ignore_errors=True)
    runs.mkdir(parents=True)
    results: dict[str, Any] = {"rate": options.rate, "command": ["scripts/two_nodes.py", *(argv or sys.argv[1:])]}
    results["arms"] = {}
    try:
        for arm in options.arms.split(","):
            result = run_arm(arm, runs, options.rate, options.steps, options.overrides)
            results["arms"][arm] = result
            print(summary(arm, result), flush=True)
            (runs / "two_nodes.json").write_text(json.dumps(results, indent=1) + "\n")
    except (NetworkError, ValueError) as error:
        print(f"two_nodes: {error}", file=sys.stderr)
        return 2
    if options.out is not None:
        report(results, runs, options.out)
    return 0 if all(all(result["checks"].values()) for result in results["arms"].values()) else 1


def run_arm(arm: str, runs: Path, rate: str, steps: int, overrides: list[str]) -> dict[str, Any]:
    """Train one arm on two fresh nodes; returns what `measure` and `check` found.

    Raises:
        NetworkError: if the nodes cannot be made or the run fails; its logs are in `runs`.
    """
    path = runs / arm
    settings = [*COMMON, *ARMS[arm], f"trainer.total_training_steps={steps}", f"rl_accel.run_dir={path}", *overrides]
    command = [sys.executable, "-m", "rl_accel.train", "recipe=gsm8k_grpo/cpu_nodes", *settings]
    # What torch has compiled, which a fresh node would have to compile once more: half a minute.
    compiled = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    compiled.mkdir(exist_ok=True)
    with RayNodes(NUM_NODES, hidden=runs, kept=[ROOT, Path(sys.prefix), compiled]) as nodes:
        nodes.network.set_rate(rate)
        with (runs / f"{arm}.log").open("w") as log:
            driver = subprocess.Popen(
                [*nodes.command(0), *command], stdout=log, stderr=subprocess.STDOUT, env=nodes.env(), cwd=runs
            )
            samples = follow(driver, path / "metrics.jsonl", nodes)
        on_second_node = sorted(str(file.relative_to("/")) for file in _files(nodes.root(1), runs))
        if driver.returncode:
            nodes.keep_logs(runs / f"{arm}_ray_logs")
            last = (runs / f"{arm}.log").read_text().splitlines()[-15:]
            raise NetworkError(f"{arm} ended with code {driver.returncode}, see {runs / arm}*:\n" + "\n".join(last))
    metrics = [json.loads(line)["data"] for line in (path / "metrics.jsonl").read_text().splitlines()]
    result = measure(metrics, samples)
    data = OmegaConf.load(path / "config.yaml").data
    closed = len(metrics) // (data.train_size // data.train_batch_size)
    return {**result, "checks": check(metrics, result, "comm" in arm, closed, on_second_node)}


def follow(driver: subprocess.Popen, path: Path, nodes: RayNodes) -> list[dict[str, Any]]:
    """Wait for the end of a run; returns a sample of every node's counters for each line of metrics."""
    samples: list[dict[str, Any]] = []
    while True:
        ended = driver.poll() is not None
        lines = path.read_text().count("\n") if path.exists() else 0
        if lines > len(samples):
            sent = [nodes.sent_bytes(node) for node in range(NUM_NODES)]
            found = [nodes.processes(node).values() for node in range(NUM_NODES)]
            cpu = [{name: sum(s for title, s in on if f"::{name}" in title) for name in ACTORS} for on in found]
            count = [{name: sum(f"::{name}" in title for title, _ in on) for name in ACTORS} for on in found]
            samples += [{"time": time.time(), "sent": sent, "cpu_s": cpu, "actors": count}] * (lines - len(samples))
        if ended:
            return samples
        time.sleep(POLL_S)


def measure(metrics: list[dict[str, float]], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of a run; the first step, in which everything starts, is left out of bytes and CPU time."""
    first, last = samples[0], samples[-1]
    comm = "actor/rl_accel/comm/"
    steps = [
        {
            "step_s": metric["timing_s/step"],
            "update_actor_s": metric["timing_s/update_actor"],
            "rollout_s": metric["timing_s/gen"],
            "reward": metric["critic/score/mean"],
            "response_length": metric["response_length/mean"],
            **{name.removeprefix(comm): value for name, value in metric.items() if name.startswith(comm)},
        }
        for metric in metrics
    ]
    for step, before, after in zip(steps[1:], samples, samples[1:], strict=False):
        step["sent_bytes_by_node"] = [b - a for a, b in zip(before["sent"], after["sent"], strict=True)]
    return {
        "steps": steps,
        "median_step_s": statistics.median(step["step_s"] for step in steps[1:]),
        "median_update_actor_s": statistics.median(step["update_actor_s"] for step in steps[1:]),
        "median_sent_bytes": statistics.median(sum(step["sent_bytes_by_node"]) / NUM_NODES for step in steps[1:]),
        "actors_by_node": last["actors"],
        "cpu_s_by_node": [
            {name: round(after[name] - before[name], 2) for name in ACTORS}
            for before, after in zip(first["cpu_s"], last["cpu_s"], strict=True)
        ],
        "history_shared": metrics[-1]["rl_accel/draft/history_shared"],
        "history_not_shared": metrics[-1]["rl_accel/draft/history_not_shared"],
        "drafted_by_history": sum(metric.get("rl_accel/draft/drafted_by_epoch_1", 0.0) for metric in metrics),
        "accepted_by_history": sum(metric.get("rl_accel/draft/accepted_by_epoch_1", 0.0) for metric in metrics),
    }


def check(
    metrics: list[dict[str, float]], result: dict[str, Any], comm: bool, num_epochs: int, on_second_node: list[str]
) -> dict[str, bool]:
    """Return what must hold of a run over two nodes, and whether it does."""
    steps = result["steps"]
    checks = {
        "a rank and an engine on each node": result["actors_by_node"] == [dict.fromkeys(ACTORS, 1)] * NUM_NODES,
        "ranks and engines of both nodes worked": all(s > 0.1 for on in result["cpu_s_by_node"] for s in on.values()),
        # Every epoch each engine packs what it has generated, which is never nothing, and the other one takes it.
        "engines took each other's history": result["history_shared"] == NUM_NODES * num_epochs > 0,
        "no history was lost": result["history_not_shared"] == 0,
        "history was drafted from and accepted": result["accepted_by_history"] > 0,
        "engines hold the trainer's weights": all(m["rl_accel/sync/readback_max_abs_err"] < 1e-6 for m in metrics),
        "engine and trainer agree": all(m["training/rollout_probs_diff_max"] < 1e-4 for m in metrics),
        "the second node wrote nothing into the run folder": not on_second_node,
    }
    if comm:
        sent = [step["gradient_inter_bytes"] + step["weight_inter_bytes"] for step in steps]
        checks |= {
            "4-bit communication saw two nodes": all(step["num_nodes"] == NUM_NODES for step in steps),
            "all its bytes were between nodes": all(
                step["gradient_intra_bytes"] == step["weight_intra_bytes"] == 0 < step["gradient_inter_bytes"]
                for step in steps
            ),
            "they crossed the interfaces": all(
                min(step["sent_bytes_by_node"]) >= said for step, said in zip(steps[1:], sent[1:], strict=True)
            ),
        }
    return checks


def summary(arm: str, result: dict[str, Any]) -> str:
    """One line of figures, and one for each check that failed."""
    failed = [f"\n  FAILED: {what}" for what, holds in result["checks"].items() if not holds]
    return (
        f"{arm}: step {result['median_step_s']:.2f} s, of it updating the actor {result['median_update_actor_s']:.2f} "
        f"s, {result['median_sent_bytes'] / 1e6:.2f} MB a node and step, {len(result['checks']) - len(failed)} of "
        f"{len(result['checks'])} checks hold" + "".join(failed)
    )


def report(results: dict[str, Any], runs: Path, out: Path) -> None:
    """Write figures to `out`, and there in a folder of each trainer what 4 bits changed."""
    out.mkdir(parents=True, exist_ok=True)
    info = json.loads((runs / next(iter(results["arms"])) / "run.json").read_text())
    results = {**{name: info[name] for name in ("git_sha", "machine", "versions")}, **results}
    (out / "two_nodes.json").write_text(json.dumps(results, indent=1) + "\n")
    for arm in results["arms"]:
        if f"{arm}_comm" in results["arms"]:
            command = [sys.executable, "-m", "rl_accel.compare", arm, f"{arm}_comm", "--out", str(out.resolve() / arm)]
            subprocess.run(command, check=True, cwd=runs)
    lines = [
        f"Links of {results['rate']}; medians without the first step; bytes by the interfaces' counters.",
        "",
        "| arm | step, s | updating the actor, s | MB a node and step | said by `rl_accel/comm/*_inter_bytes`, MB |",
        "|---|---:|---:|---:|---:|",
    ]
    for arm, result in results["arms"].items():
        step = result["steps"][-1]
        said = step.get("gradient_inter_bytes", 0.0) + step.get("weight_inter_bytes", 0.0)
        lines.append(
            f"| {arm} | {result['median_step_s']:.2f} | {result['median_update_actor_s']:.2f} | "
            f"{result['median_sent_bytes'] / 1e6:.2f} | {said / 1e6:.2f} |"
        )
    (out / "two_nodes.md").write_text("# Two nodes\n\n" + "\n".join(lines) + "\n")


def _files(root: Path, folder: Path) -> list[Path]:
    """Files in a folder of a node, by their paths there."""
    inside = root / folder.relative_to("/")
    return [Path("/") / file.relative_to(root) for file in inside.rglob("*") if file.is_file()]


if __name__ == "__main__":
    sys.exit(main())
