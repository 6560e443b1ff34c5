"""The command line as a process: reports, exit codes, arms trained by real subprocesses, Ctrl-C."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rl_accel.compare.__main__ import main
from rl_accel.compare.arms import parse_arms
from rl_accel.compare.plot import plot_runs
from rl_accel.compare.runs import Run, load_run
from rl_accel.compare.tokens import save_tokens
from rl_accel.errors import CompareError

STEPS = 20

TRAINER = """
import json, os, sys, time
from pathlib import Path
settings = dict(item.lstrip("+").split("=", 1) for item in sys.argv[1:])
run_dir = Path(settings["rl_accel.run_dir"])
run_dir.mkdir(parents=True, exist_ok=True)
seed = int(settings["rl_accel.seed"])
print("hello from the trainer", sys.argv[1:], flush=True)
if "hang" in settings:
    if os.fork() == 0:
        (run_dir / "grandchild").write_text(str(os.getpid()))
        time.sleep(600)
    (run_dir / "child").write_text(str(os.getpid()))
    time.sleep(600)
if settings.get("fail") == str(seed):
    print("the reason is here")
    sys.exit(7)
method = settings.get("rl_accel.draft.method", "none")
slow = {"none": 2.0, "ngram": 1.0}[method] * (1 + 0.001 * seed)
lines = [
    {"step": s, "data": {"critic/score/mean": (s * 7 + seed) % 5 / 5, "timing_s/gen": slow + 0.01 * (s % 3)}}
    for s in range(1, 13)
]
(run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
with open(run_dir.parent / "order", "a") as file:
    file.write(f"{run_dir.name} ")
command = ["python", "-m", "rl_accel.train", *sys.argv[1:]]
info = {"arm": method, "seed": seed, "command": command, "finished": True}
(run_dir / "run.json").write_text(json.dumps(info))
"""


def write_run(directory: Path, arm: str, speed: float, changed_step: int | None = None) -> Path:
    """A run of `STEPS` steps with tokens; equal but for its times, and one token at `changed_step`."""
    train, clock = np.random.default_rng(1), np.random.default_rng(abs(int(speed * 10)))
    lines = [{"step": 0, "data": {"val-core/gsm8k/acc/mean@1": 0.05}}]
    for step in range(1, STEPS + 1):
        gen = float(10 / speed * np.exp(0.03 * clock.standard_normal()))
        data = {
            "critic/score/mean": step / STEPS,
            "response_length/mean": 100.0 + step,
            "response_length/p95": 180.0 + step,
            "timing_s/gen": gen,
            "timing_s/step": gen + 5,
            "rollout/spec_accept_length": 1 + speed,
        }
        if step % 5 == 0:
            data["val-core/gsm8k/acc/mean@1"] = step / STEPS
        lines.append({"step": step, "data": data})
        responses = [train.integers(0, 99, 9).tolist() for _ in range(6)]
        if step == changed_step:
            responses[4][2] += 1000
        save_tokens(directory / "tokens" / f"{step}.npz", list("ppqqrr"), [0, 1] * 3, [5] * 6, responses)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    info = {"arm": arm, "seed": 0, "finished": True, "recipe": "r", "versions": {"vllm": "1" if speed > 1 else "0"}}
    (directory / "run.json").write_text(json.dumps(info))
    return directory


def compare(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rl_accel.compare", *map(str, arguments)]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=180)


def refusal(capsys, *arguments: object) -> str:
    """What the command line says when it refuses, in this process."""
    assert main([str(argument) for argument in arguments]) == 1
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "none": write_run(folder / "plain", "none", 1.0),
        "ngram": write_run(folder / "drafted", "ngram", 1.5),
        "broken": write_run(folder / "broken", "broken", 1.2, changed_step=9),
    }


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 20_000


def test_report_of_three_arms(runs, tmp_path):
    done = compare(runs["none"], runs["ngram"], runs["broken"], "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "compare.json",
        "compare.md",
        "compare.png",
    ]
    assert is_png(tmp_path / "out" / "compare.png")
    assert done.stdout == (tmp_path / "out" / "compare.md").read_text()
    assert (
        "ngram vs none: identical over 20 steps (tokens and metrics); rollout ratio 1.47 in one pair of runs"
        in done.stdout
    )
    assert "Note: The runs differ in `versions`: {'vllm': '0'} / {'vllm': '1'}." in done.stdout
    assert "tokens diverge at step 9, problem r, sample 0, token 2 of the response" in done.stdout
    result = json.loads((tmp_path / "out" / "compare.json").read_text())
    words = [(c["other"], c["word"]) for c in result["comparisons"]]
    assert words == [("ngram", "identical"), ("broken", "undecided")]
    rollout = result["comparisons"][0]["speeds"][0]
    assert (rollout["word"], rollout["pairs"], rollout["steps"]) == ("one pair of runs", 1, STEPS - 2)
    assert rollout["ratio"] == pytest.approx(1.5, rel=0.05)
    assert result["comparisons"][1]["identities"][0]["divergence"]["step"] == 9
    assert result["arms"]["ngram"]["accuracy, final"] == {"mean": 1.0, "std": None}


def test_json_on_stdout_and_exit_codes(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(runs["none"]), str(runs["ngram"]), "--json", "--fail-on-difference"]) == 0
    assert json.loads(capsys.readouterr().out)["baseline"] == "none"
    assert (tmp_path / "outputs" / "compare" / "compare.md").is_file()
    assert main([str(runs["none"]), str(runs["broken"]), "--fail-on-difference"]) == 3
    capsys.readouterr()
    assert refusal(capsys, runs["none"], "nowhere") == (
        "rl_accel.compare: nowhere: no such run folder (and not a wandb run, which is entity/project/run_id)\n"
    )
    assert "give two runs or more" in refusal(capsys, runs["none"])
    for usage in ([], [str(runs["none"]), "--seeds", "0"]):
        with pytest.raises(SystemExit, match="2"):
            main(usage)


def test_wandb_report_is_an_offline_run(runs, tmp_path):
    done = compare(
        runs["none"],
        runs["ngram"],
        "--wandb",
        "project",
        cwd=tmp_path,
        WANDB_MODE="offline",
        HOME=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    (run_dir,) = (tmp_path / "wandb").glob("offline-run-*")
    media = [path.suffix for path in (run_dir / "files" / "media").rglob("*") if path.is_file()]
    assert sorted(media) == [".json", ".png"]


def test_plot_of_one_run_of_one_step_and_of_nothing(runs, tmp_path):
    plot_runs([load_run(runs["ngram"])], tmp_path / "deep" / "curves.png", "one run")
    assert is_png(tmp_path / "deep" / "curves.png")
    single = Run("x", "x", "x", 0, {"timing_s/gen": {1: 3.0}})
    plot_runs([single], tmp_path / "single.png", "one step")
    assert (tmp_path / "single.png").stat().st_size > 5_000
    with pytest.raises(CompareError, match="nothing to plot"):
        plot_runs([Run("x", "x", "x", 0, {"other": {1: 1.0}})], tmp_path / "none.png", "")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "none,ngram",
            [("none", ["rl_accel.draft.method=none"]), ("ngram", ["rl_accel.draft.method=ngram"])],
        ),
        ("none,fast:a.b=1+c=2", [("none", ["rl_accel.draft.method=none"]), ("fast", ["a.b=1", "c=2"])]),
        ("x:lr=1e+5+c=2,y:+a=1++b=2", [("x", ["lr=1e+5", "c=2"]), ("y", ["+a=1", "+b=2"])]),
        ("x:l=[1,2]+m=3,y:l={a:1,b:2}", [("x", ["l=[1,2]", "m=3"]), ("y", ["l={a:1,b:2}"])]),
    ],
)
def test_arms_are_parsed(text, expected):
    assert [(arm.name, list(arm.overrides)) for arm in parse_arms(text)] == expected


@pytest.mark.parametrize("text", ["none", "none,none", "none,", "../x,none", "none,x:"])
def test_bad_arms_are_refused(text):
    with pytest.raises(CompareError, match="--arms"):
        parse_arms(text)


@pytest.fixture
def launcher(tmp_path) -> list[str]:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    return ["--launcher", shlex.join([sys.executable, str(script)])]


def test_arms_run_interleaved_and_finished_ones_are_kept(launcher, tmp_path):
    out = tmp_path / "out"
    arguments = ["--arms", "none,ngram", "--seeds", "2", "recipe=gsm8k_grpo", "--out", out, *launcher]
    done = compare(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (out / "order").read_text().split() == ["none-seed0", "ngram-seed0", "ngram-seed1", "none-seed1"]
    assert "[3/4] ngram, seed 1: running" in done.stderr
    assert "identical over 12 steps" in done.stdout
    assert "rollout 1.99x faster [1.99, 1.99]" in done.stdout
    log = (out / "ngram-seed1.log").read_text()
    assert "'recipe=gsm8k_grpo', 'rl_accel.draft.method=ngram', 'rl_accel.seed=1', 'rl_accel.run_dir=" in log

    info = json.loads((out / "none-seed1" / "run.json").read_text())
    (out / "none-seed1" / "run.json").write_text(json.dumps({**info, "finished": False}))
    again = compare(*arguments, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (out / "order").read_text().split()[4:] == ["none-seed1"]
    assert "[4/4] none, seed 1: going on with the run in its folder" in again.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[str]]:
    """Two arms of one seed, trained."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "trainer.py").write_text(TRAINER)
    launcher = ["--launcher", shlex.join([sys.executable, str(folder / "trainer.py")])]
    assert main(["--arms", "none,ngram", "recipe=r", "--out", str(folder / "out"), *launcher]) == 0
    return folder / "out", launcher


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("log", ["kept", "lost"])
def test_a_folder_of_other_settings_is_neither_resumed_nor_reused(trained, tmp_path, capsys, finished, log):
    """None of the arms may start: the first one, whose folder is gone, waits until the second's is seen to be right."""
    out = Path(shutil.copytree(trained[0], tmp_path / "out"))
    info = json.loads((out / "ngram-seed0" / "run.json").read_text())
    (out / "ngram-seed0" / "run.json").write_text(json.dumps({**info, "finished": finished}))
    shutil.rmtree(out / "none-seed0")
    if log == "lost":
        (out / "ngram-seed0.log").unlink()
    before = (out / "order").read_text()
    said = refusal(capsys, "--arms", "none,ngram", "recipe=r", "lr=2", "--out", out, *trained[1])
    assert "ngram-seed0 holds a run with other settings. It ran recipe=r rl_accel.draft.method=ngram" in said
    assert "asked for is recipe=r lr=2 rl_accel.draft.method=ngram rl_accel.seed=0" in said
    (out / "ngram-seed0" / "run.json").unlink()
    said = refusal(capsys, "--arms", "none,ngram", "recipe=r", "--out", out, *trained[1])
    assert "does not say how it was started" in said
    assert (out / "order").read_text() == before


def test_arms_need_a_folder_of_their_own(launcher, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    arguments = ["--arms", "none,ngram", "recipe=r", "--out", out, *launcher]
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another comparison trains in" in refusal(capsys, *arguments)
    assert "set by --seeds and --out" in refusal(capsys, *arguments, "++rl_accel.seed=3")
    (tmp_path / "file").touch()
    assert "cannot be written" in refusal(capsys, *arguments, "--out", tmp_path / "file")
    assert not (out / "order").exists()


def test_arms_with_equal_draft_method_stay_apart(launcher, tmp_path):
    arms = "plain:a=1,other:a=2+b=3"
    done = compare("--arms", arms, "recipe=r", "--out", tmp_path / "out", "--json", *launcher, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["baseline"], result["comparisons"][0]["other"]) == ("plain", "other")


def test_failed_run_stops_with_the_end_of_its_log(launcher, tmp_path):
    out = tmp_path / "out"
    done = compare("--arms", "none,ngram", "recipe=r", "fail=0", "--out", out, *launcher, cwd=tmp_path)
    assert done.returncode == 1
    assert "[1/2] none, seed 0 failed with exit code 7" in done.stderr
    assert done.stderr.endswith("the reason is here\n")
    assert not (out / "ngram-seed0").exists()
    absent = ["--launcher", "/no/such/program"]
    done = compare("--arms", "none,ngram", "recipe=r", "--out", tmp_path / "b", *absent, cwd=tmp_path)
    assert (done.returncode, "cannot start /no/such/program" in done.stderr) == (1, True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_ends_the_trainer_and_its_children(launcher, tmp_path, number):
    run_dir = tmp_path / "out" / "none-seed0"
    arguments = ["--arms", "none,ngram", "recipe=r", "hang=1", "--out", str(tmp_path / "out"), *launcher]
    process = subprocess.Popen(
        [sys.executable, "-m", "rl_accel.compare", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_interrupts,
    )
    files = [run_dir / "child", run_dir / "grandchild"]
    wait_for(lambda: all(file.is_file() and file.read_text() for file in files))
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.endswith("rl_accel.compare: interrupted\n")
    pids = [int(file.read_text()) for file in files]
    wait_for(lambda: not any(alive(pid) for pid in pids))
    assert not (tmp_path / "out" / "ngram-seed0").exists()


def hear_interrupts() -> None:
    """A shell starts background jobs with SIGINT ignored, and ignored signals are inherited."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait_for(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie that nobody has collected yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
