"""What a server's trainer keeps over restarts: real trainers, ended in every way that a server ends in."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rl_accel.errors import ConfigError
from rl_accel.speculator.client import TrainerClient
from rl_accel.speculator.head import first_weights
from rl_accel.speculator.kinds import shape_of
from rl_accel.speculator.learner import Learner
from rl_accel.speculator.served import fold
from rl_accel.speculator.state import StateFile, state_file

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


def test_the_next_trainer_goes_on_and_leaves_more(kept, tmp_path) -> None:
    """It has the state before it is asked anything. The end of its input is all that a killed engine leaves it."""
    path = tmp_path / "engine000.pt"
    path.write_bytes(kept.read_bytes())
    state = torch.load(kept, weights_only=True)
    trainer = trainer_of(path)
    assert trainer.slots.version == state["version"]
    assert trainer.slots.read_report().num_steps == state["num_steps"] > 0
    np.testing.assert_array_equal(trainer.slots.get()[1], fold(SHAPE, state["served"]).numpy())
    wait_for(lambda: trainer.slots.version > state["version"], trainer, feed=1)
    trainer.close()
    version, num_steps = version_of(path)
    assert version == trainer.slots.version and num_steps > state["num_steps"]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_damaged_file_is_kept_aside(kept, tmp_path, capfd) -> None:
    path = tmp_path / "engine000.pt"
    path.write_bytes(kept.read_bytes()[:2000])
    trainer = trainer_of(path)
    try:
        assert trainer.alive and trainer.slots.version == 1 and trainer.slots.read_report().num_steps == 0
        (aside,) = tmp_path.iterdir()
        assert aside.name.startswith("engine000.pt.refused-") and aside.read_bytes() == kept.read_bytes()[:2000]
        assert capfd.readouterr().err.count("learns anew") == 1
    finally:
        trainer.close()


def test_a_head_of_another_shape_is_kept_aside(kept, tmp_path, caplog) -> None:
    path = tmp_path / "engine000.pt"
    path.write_bytes(kept.read_bytes())
    other = replace(SHAPE, inner=SHAPE.inner + 16)
    learner = Learner(other, first_weights(other, 0), 1e-3, 3)

    def restore(order):
        state = torch.load(order["path"], weights_only=True)
        learner.load_state_dict({**state, "shape": shape_of(state["shape"])})
        return {}

    StateFile(str(path), dict, restore).restore(lambda: learner.num_steps)
    assert learner.num_steps == 0 and not path.exists() and len(list(tmp_path.iterdir())) == 1
    assert "a head of another shape" in caplog.text


def test_it_is_written_only_where_something_was_learned(tmp_path, caplog) -> None:
    """And what cannot be written is said once."""
    path = tmp_path / "engine000.pt"
    state = StateFile(str(path), lambda order: {"n": Path(order["path"]).write_text("x")}, dict)
    state.restore(lambda: 1)
    state.keep(1, now=True)
    state.keep(2)  # not yet: a minute has not passed
    assert not path.exists()
    state.keep(2, now=True)
    assert path.exists()
    path.unlink()
    state.keep(2, now=True)
    assert not path.exists()
    path.mkdir()
    for progress in (3, 4):
        state.keep(progress, now=True)
    assert caplog.text.count("is not saved") == 1


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
