"""The named patches of verl against verl itself: each symbol is where we expect it, and each does what it says."""

from __future__ import annotations

import importlib
import json
import os
import threading

import pytest

from rl_accel.errors import WeightSyncError
from rl_accel.fast_path.hosts.patches import PATCHES as FAST_PATH
from rl_accel.hosts.verl.cpu_patches import PATCHES as CPU_PATCHES
from rl_accel.hosts.verl.fsdp2_ranks import RanksOnFSDP2
from rl_accel.hosts.verl.patches import PATCHES
from rl_accel.weight_sync.watchdog import call_within

ALL = (*PATCHES, *FAST_PATH, *CPU_PATCHES, RanksOnFSDP2)


@pytest.fixture(scope="module")
def checked(in_fresh_process):
    """Patch -> what a process that has imported verl, with nothing patched, finds wrong with its symbol."""
    names = [(patch.__module__, patch.__name__) for patch in ALL]
    code = f"""
        import importlib, json
        found = {{}}
        for module, name in {names!r}:
            try:
                getattr(importlib.import_module(module), name).check_signature()
                found[name] = ""
            except Exception as error:
                found[name] = str(error)
        print(json.dumps(found))
    """
    return json.loads(in_fresh_process(code, RL_ACCEL_ACTIVE=""))


@pytest.mark.parametrize("patch", ALL, ids=lambda patch: patch.__name__)
def test_the_patched_symbol_exists_and_takes_what_was_tested(patch, checked):
    assert checked[patch.__name__] == ""


def test_the_probe_finds_every_hook_live(in_fresh_process):
    live = json.loads(
        in_fresh_process("import json; from rl_accel.hosts.verl.probe import probe; print(json.dumps(probe()))")
    )
    assert len(live) == 17
    assert all(live.values()), live


def test_without_our_environment_nothing_is_patched(in_fresh_process):
    code = "import json; from rl_accel.hosts.verl.probe import probe; print(json.dumps(probe()))"
    live = json.loads(in_fresh_process(code, RL_ACCEL_ACTIVE=""))
    assert live.pop("validate_config") and live.pop("cpu platform")
    assert all(live.pop(f"patch {patch.__name__}") for patch in CPU_PATCHES), "by VERL_PLATFORM"
    assert not any(live.values()), live


def test_the_file_logger_keeps_the_metrics_of_the_run_that_it_resumes(tmp_path, in_fresh_process):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":1,"data":{"a":1}}\n{"step":2,"da')
    code = """
        from verl.utils.tracking import FileLogger
        logger = FileLogger("p", "e"); logger.log({"a": 2}, 2); logger.finish()
    """
    in_fresh_process(code, VERL_FILE_LOGGER_PATH=str(path))
    assert path.read_text() == '{"step":1,"data":{"a":1}}\n{"step":2,"data":{"a":2}}\n'


TRANSFER = """
    import asyncio, threading, torch
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver, BucketedWeightSender
    handle = "ipc://{folder}/weights.sock"
    weights = [(f"layer{{i}}", torch.full((300, 300), float(i))) for i in range(12)]  # 12 x 0.34 MiB in 1 MiB buckets
    outcome = []

    def send():
        sender = BucketedWeightSender(handle, bucket_size_mb=1, use_shm=True)
        asyncio.run(sender.async_send_weights(iter(weights)))
        outcome.append("sent")

    def load(bucket, is_last):
        if any(name == "layer3" for name, _ in bucket):
            raise ValueError("no such layer")

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    try:
        BucketedWeightReceiver(handle, torch.device("cpu"), use_shm=True).receive_weights(on_bucket_received=load)
    except (ValueError, BufferError) as error:
        outcome.append(type(error).__name__)
    thread.join(5)
    print(sorted(outcome))
"""


def test_a_failing_receiver_lets_its_sender_finish(tmp_path, in_fresh_process):
    assert in_fresh_process(TRANSFER.format(folder=tmp_path)) == "['ValueError', 'sent']"


def test_without_the_patch_the_sender_waits_for_ever(tmp_path, in_fresh_process):
    """The bug that the patch is for; if this fails, verl has mended it and the patch can go."""
    assert "sent" not in in_fresh_process(TRANSFER.format(folder=tmp_path), RL_ACCEL_ACTIVE="")


TWO_RUNS = """
    import asyncio, os, pathlib, threading, time, torch
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver, BucketedWeightSender
    own, other = ("1", "2") if os.environ["RANK"] == "0" else ("2", "1")
    folder, os.environ["RL_ACCEL_RUN"] = pathlib.Path({folder!r}), "run" + own
    handle = "ipc:///tmp/rl-colocate-zmq-{job}-replica-0-rank-0.sock"

    def send():
        asyncio.run(sender.async_send_weights(iter([("layer", torch.full((10,), float(own)))])))

    sender = BucketedWeightSender(handle, bucket_size_mb=1, use_shm=True)
    bind = sender._init_socket
    sender._init_socket = lambda: (bind(), (folder / own).touch())
    threading.Thread(target=send, daemon=True).start()
    while not (folder / other).exists():
        time.sleep(0.01)
    seen = []
    BucketedWeightReceiver(handle, torch.device("cpu"), use_shm=True).receive_weights(
        on_bucket_received=lambda bucket, is_last: seen.extend(float(weight[0]) for _, weight in bucket)
    )
    print(seen)
"""


def test_two_runs_on_a_machine_do_not_take_each_others_weights(tmp_path, in_fresh_process):
    """Both senders are there before a receiver is. Without the patch, the second sender takes the first one's place."""
    code = TWO_RUNS.format(folder=str(tmp_path), job=os.getpid())
    assert in_fresh_process(code, world_size=2) == ["[1.0]", "[2.0]"]


def test_the_watchdog_turns_a_stuck_call_into_an_error():
    with pytest.raises(WeightSyncError, match=r"the sync did not finish within 0\.2 s"):
        call_within(threading.Event().wait, 0.2, "the sync")


def test_the_watchdog_passes_failures_on_and_lets_a_good_call_through():
    with pytest.raises(WeightSyncError, match="the sync failed: integer division or modulo by zero") as error:
        call_within(lambda: 1 // 0, 5, "the sync")
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    seen = []
    call_within(lambda: seen.append(1), 5, "the sync")
    assert seen == [1]


def test_the_reasons_are_written_down():
    for patch in ALL:
        assert len(patch.__doc__) > 60
    assert importlib.import_module("verl").__version__ == "0.9.1"
