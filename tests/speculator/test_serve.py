"""A server that learns from its traffic: real servers on the shipped policy, asked over HTTP by the `openai` client.

Two starts, one after the other with the same state; 85 s on two busy cores, most of it vLLM's start.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import rl_accel
from rl_accel.config import AccelConfig
from rl_accel.errors import ConfigError
from rl_accel.identity import hash64
from rl_accel.kernels.gumbel_argmax.reference import gumbel_noise
from rl_accel.speculator.hosts import launch
from rl_accel.speculator.hosts.serving import ADDED_UP, COUNTS

openai = pytest.importorskip("openai")

POLICY = Path(rl_accel.__file__).parent / "quickstart" / "policy"
SEED, TEMPERATURE, MAX_TOKENS, AT_ONCE = 7, 0.3, 48, 16
MAX_ROUNDS = 24
ROUNDING = 1e-3
"""Of scores in two implementations; a token that was sampled by other noise is further behind the best."""


class Server:
    """A server in a process of its own."""

    def __init__(self, state: Path, log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "rl_accel.speculator.serve", f"--model={POLICY}", "--state", str(state),
                    "rl_accel.draft.method=head", "rl_accel.draft.policy=fixed",
                    "rl_accel.draft.num_speculative_tokens=4", f"rl_accel.sampling.seed={SEED}",
                    "rl_accel.speculator.publish_s=0.3", "rl_accel.speculator.max_trace_share=1.0",
                    "rl_accel.speculator.rejected_weight=0", "rl_accel.speculator.advance_s=600",
                    "--served-model-name", "policy", "--host", "127.0.0.1",
                    "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "256",
                    "--max-num-seqs", str(AT_ONCE), "--block-size", "32", "--generation-config", "vllm",
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=120)

    def wait(self, seconds: float = 180.0) -> None:
        end = time.monotonic() + seconds
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health").close()
                return
            except OSError:
                assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()[-4000:]
                time.sleep(0.1)

    def ask(self, number: int):
        return self.client.completions.create(
            model="policy",
            prompt=f"Tom has {number} apples and buys {number + 3} more. How many apples does he have?",
            temperature=TEMPERATURE,
            max_tokens=MAX_TOKENS,
            seed=number,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        ).choices[0]

    def round(self, numbers) -> tuple[list, dict[str, float]]:
        """Numbers of some requests with their answers, and by how much the metrics grew."""
        before = self.metrics()
        with ThreadPoolExecutor(AT_ONCE) as threads:
            answers = list(zip(numbers, threads.map(self.ask, numbers), strict=True))
        return answers, {name: value - before[name] for name, value in self.metrics().items()}

    def metrics(self) -> dict[str, float]:
        """Samples of ours, by name without prefix."""
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            self.page = answer.read().decode()
        lines = [line.split() for line in self.page.splitlines() if line.startswith("rl_accel_")]
        return {name.removeprefix("rl_accel_"): float(value) for name, value in lines}

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def accepted(growth: dict[str, float]) -> float:
    """Accepted tokens a draft."""
    return growth["draft_num_accepted_tokens_total"] / max(growth["draft_num_drafts_total"], 1.0)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server that starts without anything, its traffic, its end, and the beginning of the next one."""
    folder = tmp_path_factory.mktemp("serve")
    found: dict = {"answers": [], "accepted": []}
    servers = []
    try:
        first = Server(folder / "state", folder / "first.log")
        servers.append(first)
        first.wait()
        day0: Counter = Counter()
        for step in range(MAX_ROUNDS):
            answers, growth = first.round(range(32 * step, 32 * step + 32))
            found["answers"] += answers
            found["accepted"].append(accepted(growth))
            if first.metrics()["speculator_version"] == 1.0:
                day0.update(growth)
            if found["accepted"][-1] > 1.2 and step >= 4:
                break
        found["day0"] = accepted(day0)
        found["metrics"], found["page"] = first.metrics(), first.page
        found["rc"] = first.stop()
        found["file"] = torch.load(folder / "state" / "engine000.pt", weights_only=True)
        found["num_steps"] = found["file"]["num_steps"] + found["file"]["steps_before"]
        second = Server(folder / "state", folder / "second.log")
        servers.append(second)
        second.wait()
        found["restored"] = second.metrics()
        answers, growth = second.round(range(1000, 1032))
        found["answers"] += answers
        found["next"] = accepted(growth)
        found["after"] = second.metrics()
        second.stop()
        return found
    finally:
        for server in servers:
            if server.process.poll() is None:
                server.process.kill()


def test_it_learns_from_its_traffic(served) -> None:
    """From nothing to more than one accepted token a draft, by versions that were swapped in while it served."""
    assert served["day0"] < 0.2
    assert served["accepted"][-1] > 1.2
    assert served["metrics"]["speculator_swaps_total"] > 2
    assert served["metrics"]["speculator_version"] > served["metrics"]["speculator_swaps_total"]
    assert served["metrics"]["speculator_train_steps_total"] > 20


def test_tokens_are_those_of_the_policy_alone(served) -> None:
    """Seed, prompt and position name the noise of a token, so transformers says what an engine without drafts samples:
    for every request, of both servers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    assert len(served["answers"]) > 100
    for number, answer in served["answers"]:
        prompt, tokens = answer.prompt_token_ids, answer.token_ids
        assert len(tokens) == MAX_TOKENS
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        key = hash64(f"{SEED}/seed/{number}".encode() + b"\0" + np.asarray(prompt, np.int64).tobytes())
        positions = torch.arange(len(prompt), len(prompt) + len(tokens))
        scores = logits.double() / TEMPERATURE + gumbel_noise(
            torch.full_like(positions, key), positions, logits.shape[1]
        )
        behind = scores.max(1).values - scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert float(behind.max()) < ROUNDING, number


def test_it_ends_in_order_and_its_state_is_that_of_the_end(served) -> None:
    assert served["rc"] == 0
    assert served["file"]["version"] >= served["metrics"]["speculator_version"]
    assert served["num_steps"] >= served["metrics"]["speculator_train_steps_total"]


def test_the_next_server_goes_on(served) -> None:
    """With the version, the steps, and drafts that are accepted from the first request on."""
    assert served["restored"]["speculator_version"] == served["file"]["version"]
    assert served["restored"]["speculator_train_steps_total"] == served["num_steps"]
    assert served["after"]["speculator_version"] >= served["file"]["version"]
    assert served["next"] > 0.6 * served["accepted"][-1] > served["day0"] + 0.5


def test_all_metrics_stand_beside_vllms(served) -> None:
    """Every line of the speculator's table that an engine knows, and drafting's counts, which are vLLM's."""
    from rl_accel.speculator.feature import FEATURE

    shown, page = served["metrics"], served["page"]
    of_verl = {"heads_not_saved", "heads_not_restored"}  # of checkpoints
    of_verl |= {"trainer_tap_rows", "trainer_tap_share", "trainer_taps_off"}  # of training ranks
    for line in FEATURE.metrics:
        name = f"speculator_{line.name}"
        counter = line.name in ADDED_UP["speculator"] and line.name != "saved_s"
        assert line.name in of_verl or name + "_total" * counter in shown, line.name
    for ours, theirs in (("num_drafts", "num_drafts"), ("num_accepted_tokens", "num_accepted_tokens")):
        assert ours in COUNTS
        (value,) = [
            line.split()[-1] for line in page.splitlines() if line.startswith(f"vllm:spec_decode_{theirs}_total")
        ]
        assert shown[f"draft_{ours}_total"] == pytest.approx(float(value), rel=0.02) and float(value) > 100
    assert "# TYPE rl_accel_speculator_swaps_total counter" in page
    assert "# TYPE rl_accel_speculator_version gauge" in page


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "--model is missing"),
        (["--model", "./nowhere"], "no model there"),
        (["--model"], "--model needs a folder"),
        (["--model", str(POLICY), "--speculative-config", "{}"], "--speculative-config cannot be set here"),
        ([str(POLICY), "--speculative_config.model", "ngram"], "--speculative-config cannot be set here"),
        ([str(POLICY), "-sc={}"], "--speculative-config cannot be set here"),
        ([str(POLICY), "--spec-tokens=3"], "num_speculative_tokens=N"),
        ([str(POLICY), "--worker-extension-cls", "a.B"], "--worker-extension-cls cannot be set here"),
        ([str(POLICY), "rl_accel.speculator.widht=64"], "Did you mean 'width'"),
        ([str(POLICY), "rl_accel.speculator.width"], "needs a value"),
        ([str(POLICY), "rl_accel.speculator.width=-1"], "width must be"),
        ([str(POLICY), "rl_accel.draft.method=das"], "nothing here would learn"),
        ([str(POLICY), "rl_accel.speculator.enable=false"], "nothing here would learn"),
        ([str(POLICY), "--state", "a", "rl_accel.speculator.state=b"], "differ"),
        ([str(POLICY), "--state", "/proc/none/x"], "no folder can be made there"),
    ],
)
def test_wrong_options_are_refused(options: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        ours, model, theirs = launch.split(options)
        launch.check(launch.settings(ours), model, theirs)


def test_a_refusal_is_one_line_and_quick() -> None:
    """Before vLLM is imported, which takes longer than all of this."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "rl_accel.speculator.serve", "--model", str(POLICY), "--speculative-config", "{}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1 and time.monotonic() - started < 10
    assert done.stdout == "" and done.stderr.count("\n") == 1 and "rl_accel: --speculative-config" in done.stderr


def test_settings_and_options_are_told_apart() -> None:
    ours, model, theirs = launch.split(
        ["--port", "1", "--model=m", "rl_accel.speculator.width=64", "--state", "123", "--additional-config", "{}"]
    )
    assert (model, theirs) == ("m", ["--port", "1", "--additional-config", "{}"])
    accel = launch.settings(ours)
    assert accel.settings["speculator"].width == 64 and accel.settings["speculator"].state == "123"
    assert accel.settings["sampling"].exact and accel.settings["draft"].method == "auto"
    assert not AccelConfig().settings["sampling"].exact, "a default of the server, not of everybody"
