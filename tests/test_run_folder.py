"""The folder of a run: one run at a time, no change of settings without a word, nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from rl_accel.errors import ConfigError
from rl_accel.run_folder import RunFolder, default_path, write_whole

BEGUN = {
    "trainer": {"total_training_steps": 4, "default_local_dir": "${rl_accel.run_dir}/checkpoints"},
    "actor": {"lr": 1e-6, "betas": [0.9, 0.999]},
    "rl_accel": {"run_dir": None, "draft": {"method": "none"}},
}


def begun(path, **changes):
    """The settings of a run in `path`, with some changed."""
    config = OmegaConf.create(BEGUN)
    config.rl_accel.run_dir = str(path)
    for name, value in changes.items():
        OmegaConf.update(config, name.replace("__", "."), value, force_add=True)
    return config


@pytest.fixture
def folder(tmp_path):
    """A folder that holds a run."""
    folder = RunFolder(tmp_path / "run")
    folder.open(resume=False)
    folder.save_config(begun(folder.path), accept_changes=False)
    folder.metrics.write_text('{"step":1,"data":{}}\n')
    return folder


def hold(path):
    """Another process that takes the folder and waits."""
    code = (
        "import sys, time; from rl_accel.run_folder import RunFolder\n"
        "RunFolder(sys.argv[1]).open(resume=True); print('taken', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "taken\n"
    return process


def test_two_runs_do_not_share_a_folder_and_a_killed_one_lets_go(tmp_path):
    first = hold(tmp_path / "run")
    try:
        with pytest.raises(ConfigError, match=f"process {first.pid} is training in this folder"):
            RunFolder(tmp_path / "run").open(resume=True)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    RunFolder(tmp_path / "run").open(resume=True)


def test_a_resumed_run_keeps_the_settings_that_it_began_with(folder):
    folder.save_config(begun(folder.path), accept_changes=False)
    with pytest.raises(ConfigError) as error:
        folder.save_config(begun(folder.path, actor__lr=2e-6, rl_accel__draft__method="das"), accept_changes=False)
    assert "actor.lr: 1e-06 -> 2e-06" in str(error.value)
    assert "rl_accel.draft.method: none -> das" in str(error.value)
    assert OmegaConf.load(folder.config).actor.lr == 1e-6


def test_accepted_changes_are_kept_in_run_json(folder):
    folder.save_config(begun(folder.path, actor__lr=2e-6), accept_changes=True)
    assert folder.read_info()["changes"] == ["actor.lr: 1e-06 -> 2e-06"]
    assert OmegaConf.load(folder.config).actor.lr == 2e-6


def test_a_run_may_go_on_for_longer_and_may_be_moved(folder, tmp_path):
    folder.save_config(begun(folder.path, trainer__total_training_steps=8), accept_changes=False)
    assert folder.read_info()["changes"] == ["trainer.total_training_steps: 4 -> 8"]
    moved = RunFolder(folder.path.rename(tmp_path / "moved"))
    moved.save_config(begun(moved.path, trainer__total_training_steps=8), accept_changes=False)
    assert len(moved.read_info()["changes"]) == 1


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]", b"a: [", b"{" * 5000])
def test_damaged_files_of_a_run_are_named(folder, content):
    folder.config.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.yaml is damaged"):
        folder.save_config(begun(folder.path), accept_changes=False)
    folder.info.write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.json is damaged"):
        folder.read_info()


def test_a_folder_that_takes_no_files_is_refused():
    with pytest.raises(ConfigError, match="cannot be written"):
        RunFolder("/proc/run").open(resume=False)


def test_a_refused_run_leaves_its_new_folder_away_and_an_old_one_alone(tmp_path, folder):
    new = RunFolder(tmp_path / "new")
    new.open(resume=False)
    new.discard()
    assert not new.path.exists()
    again = RunFolder(folder.path)
    os.close(folder._lock)
    again.open(resume=True)
    again.discard()
    assert again.metrics.exists()


def test_runs_of_one_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len({default_path("gsm8k_grpo/cpu") for _ in range(5)}) == 5


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("{}")

    def fail(partial):
        partial.write_text("{")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        write_whole(path, fail)
    assert json.loads(path.read_text()) == {}
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]
