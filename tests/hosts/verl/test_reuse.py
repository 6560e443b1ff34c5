"""`compare --arms` knows the folder of a real run: what it was made with, and what would be another run."""

from __future__ import annotations

import json

import pytest

from rl_accel.compare.reuse import check_same_settings, is_finished
from rl_accel.errors import CompareError


def test_the_folder_of_a_real_run_is_recognized(plain_run):
    command = json.loads((plain_run.path / "run.json").read_text())["command"]
    settings = [part for part in command[command.index("rl_accel.train") + 1 :] if "rl_accel.run_dir" not in part]
    assert is_finished(plain_run.path)
    check_same_settings(plain_run.path, settings)
    check_same_settings(plain_run.path, [*settings, "rl_accel.draft.method=none"])  # what it was anyway
    for setting, told in (
        ("actor_rollout_ref.actor.optim.lr=0.5", r"actor_rollout_ref\.actor\.optim\.lr was .*, is 0\.5"),
        ("rl_accel.seed=9", r"rl_accel\.seed was 0, is 9"),
        ("rl_accel.draft.method=das", r"rl_accel\.draft\.method was 'none', is 'das'"),
        ("actor_rollout_ref.model.path=/other", r"actor_rollout_ref\.model\.path was '.*policy', is '/other'"),
    ):
        with pytest.raises(CompareError, match=told):
            check_same_settings(plain_run.path, [*settings, setting])
