"""What a server's trainer keeps over restarts: real trainers, ended in every way that a server ends in."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rl_accel.errors import ConfigError
from rl_accel.speculator.client import TrainerClient
from rl_accel.speculator.head import first_weights
from rl_accel.speculator.served import fold
from rl_accel.speculator.state import state_file

from .test_process import CONFIG, wait_for
from .world import LAYOUT, SHAPE


def trainer_of(path: Path, shape=SHAPE) -> TrainerClient:
    made = TrainerClient(shape, LAYOUT, replace(CONFIG, state=str(path)), first_weights(shape, 0))
    made.start()
    assert made.wait_ready()
    return made


def version_of(path: Path) -> tuple[int, int]:
    state = torch.load(path, weights_only=True)
    return state["version"], state["num_steps"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """What a trainer wrote when it was told to end; nobody had given it an order to save."""
    path = tmp_path_factory.mktemp("state") / "folder" / "engine000.pt"
    trainer = trainer_of(path)
    wait_for(lambda: trainer.slots.version >= 3, trainer, feed=1)
    os.kill(trainer.pid, signal.SIGTERM)
    trainer._process.wait(10)
    assert trainer.slots.version == version_of(path)[0] >= 3
    return path


def test_the_next_trainer_goes_on_before_it_is_asked(kept) -> None:
    state = torch.load(kept, weights_only=True)
    trainer = trainer_of(kept)
    try:
        assert trainer.slots.version == state["version"]
        assert trainer.slots.read_report().num_steps == state["num_steps"] > 0
        np.testing.assert_array_equal(trainer.slots.get()[1], fold(SHAPE, state["served"]).numpy())
    finally:
        trainer.close()


def test_it_is_written_when_the_engine_goes(kept, tmp_path) -> None:
    """The end of the input is all that a killed engine leaves; nothing is written where nothing was learned."""
    path = tmp_path / "engine000.pt"
    path.write_bytes(kept.read_bytes())
    version, num_steps = version_of(path)
    idle = trainer_of(path)
    before = path.stat().st_mtime_ns
    idle.close()
    assert path.stat().st_mtime_ns == before
    trainer = trainer_of(path)
    wait_for(lambda: trainer.slots.version > version, trainer, feed=1)
    trainer.close()
    assert version_of(path)[0] == trainer.slots.version and version_of(path)[1] > num_steps
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name]


@pytest.mark.parametrize("damage", ["truncated", "other shape"])
def test_what_cannot_be_read_is_kept_aside(kept, tmp_path, capfd, damage: str) -> None:
    path = tmp_path / "engine000.pt"
    content = kept.read_bytes()[:2000] if damage == "truncated" else kept.read_bytes()
    path.write_bytes(content)
    shape = SHAPE if damage == "truncated" else replace(SHAPE, inner=SHAPE.inner + 16)
    trainer = trainer_of(path, shape)
    try:
        assert trainer.alive and trainer.slots.version == 1 and trainer.slots.read_report().num_steps == 0
        (aside,) = tmp_path.iterdir()
        assert aside.name.startswith("engine000.pt.refused-") and aside.read_bytes() == content
        assert capfd.readouterr().err.count("learns anew") == 1
    finally:
        trainer.close()


def test_a_folder_that_cannot_be_written_costs_the_state_only(kept, tmp_path, capfd) -> None:
    path = tmp_path / "file" / "engine000.pt"
    path.parent.write_text("no folder")
    trainer = trainer_of(path)
    wait_for(lambda: trainer.slots.version >= 2, trainer, feed=1)
    started = time.monotonic()
    trainer.close()
    assert trainer._process.returncode == 0 and time.monotonic() - started < 5
    assert capfd.readouterr().err.count("is not saved") == 1


def test_every_engine_has_a_file_of_its_own() -> None:
    assert state_file("", 3) == ""
    assert state_file("/a/b", 0) == "/a/b/engine000.pt" and state_file("/a/b", 3) == "/a/b/engine003.pt"


def test_verl_runs_have_checkpoints() -> None:
    from rl_accel.config import AccelConfig
    from rl_accel.speculator.feature import FEATURE
    from rl_accel.speculator.hosts.driver import SpeculatorDriver

    accel = AccelConfig.from_mapping({"draft": {"method": "auto"}, "speculator": {"state": "/somewhere"}})
    with pytest.raises(ConfigError, match="checkpoints hold the head"):
        SpeculatorDriver(FEATURE, accel.settings["speculator"], accel).check(None)
