"""The trainer as a process of its own: learns from shared memory, publishes, saves, opens; killed, it is not missed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from rl_accel.speculator.client import TrainerClient
from rl_accel.speculator.config import SpeculatorConfig
from rl_accel.speculator.head import first_weights
from rl_accel.speculator.served import fold

from .world import LAYOUT, SHAPE, rows_of

ENGINE = Path(__file__).with_name("engine_to_kill.py")
CONFIG = SpeculatorConfig(enable=True, learning_rate=8e-3, depth=3, replay_tokens=8192, publish_s=0.2)


def client() -> TrainerClient:
    made = TrainerClient(SHAPE, LAYOUT, CONFIG, first_weights(SHAPE, 0))
    made.start()
    return made


def wait_for(condition, client: TrainerClient, seconds: float = 90.0, feed: int = 0) -> None:
    """Wait, and go on leaving traces: the trainer rests while the engine does not generate."""
    end, first = time.monotonic() + seconds, feed
    while not condition():
        assert client.alive and time.monotonic() < end
        if feed:
            client.ring.put(rows_of(4, 24, seed=first, first=first))
            first += 4
        time.sleep(0.2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer that has published some versions, and what it saved."""
    trainer = client()
    wait_for(lambda: trainer.slots.version >= 4, trainer, feed=1)
    path = tmp_path_factory.mktemp("head") / "folder" / "engine000.pt"
    answer = trainer.ask("save", path=str(path))
    yield trainer, path, answer
    trainer.close()


def test_it_learns_from_the_ring_and_publishes(trained) -> None:
    trainer, _, _ = trained
    report = trainer.slots.read_report()
    assert report.num_steps > 0 and report.train_s > 0.0
    assert report.held_out_accept > 0.0
    version, folded, problem = trainer.slots.get()
    assert problem == "" and version >= 4
    assert not np.array_equal(folded, fold(SHAPE, first_weights(SHAPE, 0)).numpy())


def test_it_saves_and_another_one_goes_on(trained) -> None:
    _, path, answer = trained
    assert answer["path"] == str(path) and path.is_file() and not list(path.parent.glob("*.tmp"))
    state = torch.load(path, weights_only=True)
    other = client()
    try:
        opened = other.ask("open", path=str(path))
        assert opened["num_steps"] == answer["num_steps"] == state["num_steps"]
        assert opened["version"] == answer["version"], "versions go on where they were"
        served = other.slots.get()[1]
        np.testing.assert_array_equal(served, fold(SHAPE, state["served"]).numpy())
        path.with_name("broken.pt").write_bytes(path.read_bytes()[:1000])
        assert "error" in other.ask("open", path=str(path.with_name("broken.pt")))
        assert "error" in other.ask("open", path=str(path.with_name("missing.pt")))
        assert other.ask("save", path=str(path.with_name("again.pt")))["version"] == opened["version"]
    finally:
        other.close()


def test_it_goes_on_from_a_version_that_it_has_served_already(tmp_path) -> None:
    """As a run does that is killed before its first new version: the number it resumes from is the first one again."""
    trainer = client()
    try:
        path = tmp_path / "engine000.pt"
        assert trainer.ask("save", path=str(path))["version"] == 1
        assert trainer.ask("open", path=str(path))["version"] == 1
        wait_for(lambda: trainer.slots.version >= 7, trainer, feed=1)
        assert trainer.ask("save", path=str(path))["version"] >= 7
    finally:
        trainer.close()


def test_an_engine_that_goes_back_is_followed(trained) -> None:
    trainer, _, _ = trained
    version = trainer.slots.version
    assert trainer.ask("serve", version=version) == {"known": True}
    assert trainer.ask("serve", version=10**6) == {"known": False}


def test_two_orders_at_once_are_both_answered(trained) -> None:
    trainer, path, _ = trained
    assert trainer.tell("serve", version=10**6)
    assert trainer.ask("save", path=str(path.with_name("third.pt")))["path"].endswith("third.pt")


@pytest.mark.parametrize("how", ["no share", "paused"])
def test_without_permission_it_does_not_train(trained, how: str) -> None:
    trainer, _, _ = trained
    slots = trainer.slots
    slots.allowed_share, slots.paused = (0.0, False) if how == "no share" else (1.0, True)
    time.sleep(1.0)
    before = slots.read_report()
    trainer.ring.put(rows_of(40, 24, first=5000 if how == "paused" else 6000))
    time.sleep(1.5)
    after = slots.read_report()
    assert after.num_steps == before.num_steps and after.train_s == before.train_s
    slots.allowed_share, slots.paused = 1.0, False
    trainer.ring.put(rows_of(40, 24, first=7000 if how == "paused" else 8000))
    end = time.monotonic() + 20
    while slots.read_report().num_steps == before.num_steps and time.monotonic() < end:
        time.sleep(0.05)
    assert slots.read_report().num_steps > before.num_steps


def test_a_killed_trainer_is_not_missed() -> None:
    """Orders fail with the reason, traces go nowhere, and the served weights stay."""
    trainer = client()
    assert trainer.ask("serve", version=1)["known"]
    os.kill(trainer.pid, signal.SIGKILL)
    answer = trainer.ask("save", path="/nowhere")
    assert "gone" in answer["error"] or "answer" in answer["error"]
    end = time.monotonic() + 10
    while trainer.alive and time.monotonic() < end:  # the kernel takes a moment to let it be reaped
        time.sleep(0.01)
    assert not trainer.alive
    assert trainer.ask("save", path="/nowhere")["error"] == "the trainer of the speculator is gone"
    trainer.ring.put(rows_of(4, 10))
    assert trainer.slots.get()[2] == ""
    trainer.close()


def test_it_ends_with_its_engine() -> None:
    """The engine is killed while its trainer trains; nothing is left."""
    engine = subprocess.Popen([sys.executable, str(ENGINE)], stdout=subprocess.PIPE, text=True)
    assert engine.stdout is not None
    trainer = int(engine.stdout.readline())
    assert os.path.exists(f"/proc/{trainer}")
    engine.kill()
    engine.wait()
    end = time.monotonic() + 5
    while os.path.exists(f"/proc/{trainer}") and time.monotonic() < end:
        with open(f"/proc/{trainer}/stat", encoding="utf-8") as stat:
            if stat.read().rsplit(")", 1)[1].split()[0] == "Z":
                return  # nobody reaps it in a container without init
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{trainer}")
