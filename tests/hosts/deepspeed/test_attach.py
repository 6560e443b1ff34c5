"""4-bit communication attached to DeepSpeed engines, 1, 2 and 4 real gloo processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from rl_accel.comm.hosts.deepspeed.checks import HOST_SYMBOLS, changed_host_symbols

SCRIPT = Path(__file__).with_name("engine_ranks.py")
CASES = [
    "sixteen_bits_is_deepspeed",
    "four_bits_train",
    "overlap_is_the_same_run",
    "detach_restores",
    "resume_is_bit_equal",
    "a_skipped_step_sends_no_weights",
    "a_search_for_the_loss_scale_is_no_try",
    "a_slow_rank_is_not_a_slow_link",
    "start_step_sends_in_full",
    "a_replica_that_drifts_stops_the_run",
    "refusals",
    "gradients_that_go_elsewhere_stop_the_run",
    "ranks_that_disagree",
    "a_failed_attach_changes_nothing",
    "a_codec_that_is_not_built_on_one_rank_is_refused_on_all",
    "a_changed_host_symbol_is_refused",
    "initialize_with_a_block",
    "bypass_decides_alike",
    "weights_set_by_hand_go_out_in_full",
    "a_state_loaded_on_some_ranks_is_an_error_on_all",
    "stage3_sends_differences",
    "stage3_in_full_is_deepspeed",
    "stage3_follows_whoever_writes",
    "stage3_resumes_bit_equal",
    "stage3_fetches_elsewhere_stop_the_run",
]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_attach(run_ranks, world_size, tmp_path):
    """All cases of engine_ranks.py in one launch: importing DeepSpeed takes longer than they do. None compiles an
    operation: PyTorch waits for ever for the lock of a build that was killed."""
    extensions = tmp_path / "extensions"
    for result in run_ranks(SCRIPT, world_size, *CASES, timeout=600, TORCH_EXTENSIONS_DIR=str(extensions)):
        assert result == CASES
    assert not extensions.exists()


def test_every_case_is_run():
    files = [SCRIPT.with_name(f"{name}_cases.py") for name in ("training", "attach", "stage3")]
    lines = [line for file in files for line in file.read_text().splitlines()]
    defined = {line[9:].split("(")[0] for line in lines if line.startswith("def case_")}
    assert defined == {*CASES, "killed"}


def test_a_killed_rank_is_an_error_on_the_others(run_ranks):
    codes, logs = run_ranks(SCRIPT, 4, "killed", timeout=180, expect_failure=True)
    assert codes[1] == -9
    assert all(code not in (0, -9) for rank, code in enumerate(codes) if rank != 1), logs


@pytest.mark.parametrize("optimizer", HOST_SYMBOLS)
def test_symbols_of_the_installed_deepspeed_are_those_that_were_tested(optimizer):
    """The canary: fails when a release of DeepSpeed moves what we join."""
    assert changed_host_symbols(optimizer) == []
