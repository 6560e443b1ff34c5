"""Every entry of verl through which a configuration can come: it is served, or told that it is not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rl_accel import recipes

REFUSED = "drives verl's synchronous V1 trainer only"
BLOCK = "+actor_rollout_ref.rollout.custom.rl_accel.sampling.exact=true"


@pytest.mark.parametrize(
    ("module", "runner"),
    [
        ("verl.experimental.fully_async_policy.fully_async_main", "FullyAsyncTaskRunner"),
        ("verl.experimental.one_step_off_policy.main_ppo", "OneStepTaskRunner"),
    ],
)
def test_trainers_that_are_not_served_say_so_before_ray_starts(tmp_path, module, runner):
    """The fully asynchronous trainer validates nothing, so the block was ignored without a word."""
    result = subprocess.run(
        [sys.executable, "-m", module, BLOCK, "actor_rollout_ref.rollout.name=vllm", f"hydra.run.dir={tmp_path}"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=recipes.verl_config_dir().parents[2],  # one of them names its configuration by a path from there
        env={**os.environ, "VERL_PLATFORM": "cpu"},
        check=False,
    )
    assert result.returncode == 1
    assert REFUSED in result.stderr and runner in result.stderr
    assert "ray init kwargs" not in result.stdout


def test_a_killed_save_leaves_the_last_checkpoint_to_resume_from(tmp_path, in_fresh_process):
    """verl truncates the file that names the latest checkpoint before it writes it, and writes it before the step is
    logged."""
    code = f"""
        import os
        from verl.trainer.ppo.v1 import trainer_base
        from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path
        from rl_accel.hosts.verl.patches import CheckpointTracker
        path = {str(tmp_path)!r} + "/latest_checkpointed_iteration.txt"
        os.makedirs({str(tmp_path)!r} + "/global_step_2")
        with trainer_base.open(path, "w") as file:
            file.write("2")
        CheckpointTracker.complete({str(tmp_path)!r})
        with trainer_base.open(path, "w") as file:
            file.write("4")  # and the kill before the step is logged
        assert find_latest_ckpt_path({str(tmp_path)!r}).endswith("global_step_2")
        try:
            with trainer_base.open(path, "w") as file:
                raise KeyboardInterrupt  # where the kill falls between the truncation and the number
        except KeyboardInterrupt:
            pass
        print(find_latest_ckpt_path({str(tmp_path)!r}))
    """
    assert in_fresh_process(code) == f"{tmp_path}/global_step_2"
