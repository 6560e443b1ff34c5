"""Snapshots of drafting history: what is saved is restored, and a killed save harms nothing."""

from __future__ import annotations

import itertools
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rl_accel.draft import DraftConfig, SuffixDrafter
from rl_accel.errors import DraftError

# What is saved is restored.


@pytest.mark.parametrize("pending", [True, False], ids=["rollouts that wait for the close", "all closed"])
def test_a_reopened_drafter_drafts_as_the_saved_one(history, tmp_path, pending) -> None:
    """Also the ages of epochs are the same, by which predictions are weighed; an empty close at the save moved them."""
    drafter, rng = history.taught(), random.Random(9)
    if pending:
        history.teach(drafter, "a", [rng.randrange(6) for _ in range(100)])
    drafter.save(tmp_path / "s")
    copy = history.open(tmp_path / "s")
    copy.index.check_integrity()
    assert (copy.epoch, copy.window) == (drafter.epoch, drafter.window) == (3, 8)
    ours, theirs = copy.planner.state_dict(), drafter.planner.state_dict()
    mine, expected = (state.pop("lengths") for state in (ours, theirs))
    assert ours == theirs and mine.keys() == expected.keys()
    assert all(np.array_equal(mine[name], expected[name]) for name in mine)
    assert copy.index.segments() == drafter.index.segments()
    assert [s["policy_version"] for s in copy.index.segments() if s["epoch"] < 3] == [20, 10, 0]
    assert np.array_equal(copy.index.scoring_state(), drafter.index.scoring_state())
    drafter.take_source_stats()
    for problem in "ab":
        text = [rng.randrange(6) for _ in range(100)]
        drafts = history.read_through(drafter, problem, text)
        assert drafts == history.read_through(copy, problem, text)
        assert sum(map(len, drafts)) > 200
    found, wanted = copy.take_source_stats(), drafter.take_source_stats()
    assert {k: v.tolist() for k, v in found.items()} == {k: v.tolist() for k, v in wanted.items()}


def test_a_snapshot_of_nothing_is_a_snapshot(history, tmp_path) -> None:
    SuffixDrafter(history.CONFIG, tokenizer=history.TOKENIZER).save(tmp_path / "s")
    assert history.open(tmp_path / "s").index.segments() == []


def test_saving_again_replaces_the_snapshot_whole(history, tmp_path) -> None:
    history.taught(epochs=4).save(tmp_path / "s")
    assert len(list((tmp_path / "s").glob("*.segment"))) == 4
    history.taught(epochs=1, seed=1).save(tmp_path / "s")
    assert sorted(os.listdir(tmp_path / "s")) == ["000.segment", "learned.npz", "manifest.json"]
    assert os.listdir(tmp_path) == ["s"]
    assert history.open(tmp_path / "s").epoch == 1


def test_a_smaller_window_opens_the_newest_epochs_only(history, snapshot) -> None:
    config = DraftConfig(method="das", window=2)
    drafter = SuffixDrafter.open(snapshot, config, tokenizer=history.TOKENIZER)
    assert drafter.window == 2
    assert [s["epoch"] for s in drafter.index.segments()] == [2, 1]


@pytest.mark.parametrize(
    "kind", ["foreign file", "foreign manifest", "snapshot with a foreign file", "snapshot without manifest", "a file"]
)
def test_what_is_no_snapshot_is_not_replaced(history, tmp_path, kind) -> None:
    target = tmp_path / "s"
    if kind == "a file":
        target.write_text("precious")
    else:
        target.mkdir()
        if kind.startswith("snapshot"):
            history.taught(epochs=1).save(target)
        if kind == "snapshot without manifest":
            (target / "manifest.json").unlink()
        name = {"foreign manifest": "manifest.json", "snapshot without manifest": "x.segment"}.get(kind, "thesis.tex")
        (target / name).write_text('{"name": "precious"}')
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(DraftError, match="not a snapshot"):
        history.taught(epochs=1).save(target)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_a_place_that_cannot_be_written_is_named(history, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DraftError, match="file/s"):
        history.taught(epochs=1).save(tmp_path / "file" / "s")
    with pytest.raises(DraftError, match="file/s"):
        history.open(tmp_path / "file" / "s")


def test_a_segment_outlives_its_file(history, snapshot) -> None:
    drafter, expected = history.open(snapshot), history.taught()
    expected.save(snapshot.with_name("other"))
    text = [0, 1, 2, 3] * 5
    shutil.rmtree(snapshot)
    assert history.read_through(drafter, "a", text) == history.read_through(expected, "a", text)
    drafter.index.check_integrity()
    drafter.save(snapshot)
    assert history.open(snapshot).index.segments() == drafter.index.segments()


def test_what_an_earlier_snapshot_holds_is_linked_and_the_rest_written(history, tmp_path) -> None:
    """Also by a drafter that was opened from it; a file of the same name and size that says something else is not."""
    drafter = history.taught()
    drafter.save(tmp_path / "first")
    history.teach(drafter, "c", [1, 2, 3])
    drafter.save(tmp_path / "second")
    history.open(tmp_path / "second").save(tmp_path / "third")
    inodes = [{p.stat().st_ino for p in (tmp_path / name).glob("*.segment")} for name in ("first", "second", "third")]
    assert inodes[0] < inodes[1] == inodes[2] and len(inodes[1]) == 4
    history.taught(seed=1).save(tmp_path / "first")
    drafter.save(tmp_path / "second")
    (tmp_path / "second" / "003.segment").write_bytes((tmp_path / "first" / "002.segment").read_bytes())
    drafter.save(tmp_path / "fourth")
    assert history.open(tmp_path / "fourth").index.segments() == drafter.index.segments()


def test_lengths_of_many_problems_are_no_text(history, tmp_path) -> None:
    """17,000 problems with 64 lengths took 2.3 s as JSON, in which the engine does nothing else."""
    drafter = SuffixDrafter(history.CONFIG, tokenizer=history.TOKENIZER)
    for number in range(3000):
        drafter.planner.lengths.observe(number, 1 + number % 500)
    drafter.save(tmp_path / "s")
    assert (tmp_path / "s" / "manifest.json").stat().st_size < 2000
    assert len(history.open(tmp_path / "s").planner.lengths) == 3000


# A killed save harms nothing, and neither does one that fails.


@pytest.mark.parametrize("limit", [0, 500, 3000, 10_000, 100_000])
def test_a_full_disk_leaves_the_old_snapshot_and_nothing_else(history, tmp_path, limit) -> None:
    """No file may grow beyond the limit: a segment, learned.npz or manifest.json cannot be written."""
    path, new = tmp_path / "s", heavy(history, 3)
    heavy(history, 2).save(path)

    def save() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(DraftError, match=f"{path}.*: File too large"):
            new.save(path)

    assert os.waitpid(forked(save), 0)[1] == 0
    assert os.listdir(tmp_path) == ["s"]
    assert marker_of(history, path) == 2


def heavy(history, marker: int) -> SuffixDrafter:
    """A drafter of some hundred kB whose whole content tells `marker`: epochs, tokens, planner."""
    drafter, rng = SuffixDrafter(history.CONFIG, tokenizer=history.TOKENIZER), np.random.default_rng(marker)
    for epoch in range(marker):
        for problem in range(20):
            history.teach(drafter, f"p{problem}", (rng.integers(0, 500, 900) + 1000 * marker).tolist())
        drafter.close_epoch(epoch)
    return drafter


def marker_of(history, path: Path) -> int:
    """Open a snapshot, check that nothing is missing or mixed, and return whose it is."""
    drafter = history.open(path)
    drafter.index.check_integrity()
    marker = drafter.epoch
    assert [s["epoch"] for s in drafter.index.segments()] == list(range(marker))[::-1]
    assert all(s["num_tokens"] == 20 * 900 for s in drafter.index.segments())
    for epoch in range(marker):
        text = first_text(marker, epoch)
        assert history.read_through(drafter, "p0", text[:9])[-1][:1] == [text[9]]
    return marker


def first_text(marker: int, epoch: int) -> list[int]:
    rng = np.random.default_rng(marker)
    for _ in range(20 * epoch):
        rng.integers(0, 500, 900)
    return (rng.integers(0, 500, 900) + 1000 * marker).tolist()


def forked(act) -> int:
    """Run `act` in a child; returns its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return pid


def test_random_kills_during_saves_leave_a_whole_snapshot(history, tmp_path) -> None:
    """30 processes save two histories in turn and are killed within 50 ms; a save lasts some 10 ms."""
    path, drafters = tmp_path / "s", [heavy(history, 2), heavy(history, 3)]
    drafters[0].save(path)
    rng, seen, hit = random.Random(0), set(), 0
    for number in range(30):

        def save_for_ever(first=number) -> None:
            for turn in itertools.count(first):
                drafters[turn % 2].save(path)

        pid = forked(save_for_ever)
        while not any(name == f"s.tmp{pid}" for name in os.listdir(tmp_path)):
            time.sleep(0.0005)
        time.sleep(rng.uniform(0.0, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        hit += any(name.endswith(str(pid)) for name in os.listdir(tmp_path))
        seen.add(marker_of(history, path))
        assert len(os.listdir(tmp_path)) <= 3, "what killed saves leave behind must not pile up"
    assert hit >= 10 and seen == {2, 3}, (hit, seen)
    drafters[0].save(path)
    assert os.listdir(tmp_path) == ["s"]
    assert marker_of(history, path) == 2


CHANGES = ("os.rename", "os.link", "os.mkdir", "os.rmdir", "os.remove", "open", "shutil.rmtree")


def test_a_kill_before_any_change_of_the_file_system_leaves_a_whole_snapshot(history, tmp_path) -> None:
    """A process is killed before its k-th change, for every k; what one leaves behind is what the next one finds."""
    path, drafters = tmp_path / "s", [heavy(history, 2), heavy(history, 3)]
    drafters[0].save(path)
    current, kills, rng = 2, 0, random.Random(0)
    for number in range(100):
        k = number if number < 30 else rng.randrange(30)
        new = drafters[number % 2]

        def save(new=new, left=k) -> None:
            def hook(event: str, args: tuple) -> None:
                nonlocal left
                if event in CHANGES and str(args[0]).startswith((str(tmp_path), "0", "manifest", "learned")):
                    left -= 1
                    if left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            new.save(path)

        status = os.waitpid(forked(save), 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        found = marker_of(history, path)
        assert found == new.epoch if not os.WIFSIGNALED(status) else found in (current, new.epoch), (number, k)
        current = found
        kills += os.WIFSIGNALED(status)
    assert kills >= 50
    drafters[0].save(path)
    assert os.listdir(tmp_path) == ["s"]


@pytest.mark.parametrize("newest", [0, 1])
def test_of_two_snapshots_that_killed_saves_put_away_the_newer_one_counts(history, tmp_path, newest) -> None:
    path, pids = tmp_path / "s", sorted(dead_pids(2), key=str)
    for marker, pid in ((3, pids[1 - newest]), (2, pids[newest])):
        heavy(history, marker).save(tmp_path / "elsewhere")
        shutil.copytree(tmp_path / "elsewhere", tmp_path / f"s.old{pid}")
        time.sleep(0.02)
    (tmp_path / f"s.old{pids[1 - newest]}" / "000.segment").unlink()  # its removal has begun
    assert marker_of(history, path) == 2


@pytest.mark.parametrize("pid", ["own", "dead"])
def test_the_only_copy_survives_until_the_new_one_has_its_name(history, tmp_path, pid) -> None:
    """In a container a restarted process may have the pid of the one that was killed between its renames."""
    path = tmp_path / "s"
    heavy(history, 2).save(path)
    number = os.getpid() if pid == "own" else dead_pids(1)[0]
    path.rename(tmp_path / f"s.old{number}")
    (tmp_path / f"s.tmp{number}").mkdir()
    assert marker_of(history, path) == 2
    seen: list[str] = []

    def hook(event: str, args: tuple) -> None:
        if seen is not None and active and event == "os.rename" and str(args[1]) == str(path):
            seen.append("old" if (tmp_path / f"s.old{number}" / "manifest.json").exists() else "none")

    active = True
    sys.addaudithook(hook)
    try:
        heavy(history, 3).save(path)
    finally:
        active = False
    assert seen == ["old"]
    assert os.listdir(tmp_path) == ["s"]
    assert marker_of(history, path) == 3


def dead_pids(n: int) -> list[int]:
    pids = [forked(lambda: None) for _ in range(n)]
    for pid in pids:
        os.waitpid(pid, 0)
    return pids


def test_another_process_that_saves_now_is_left_alone(history, tmp_path) -> None:
    """Left-overs of live processes are theirs."""
    theirs = tmp_path / f"s.tmp{os.getppid()}"
    theirs.mkdir()
    (tmp_path / "s.tmpfiles").mkdir()
    (tmp_path / "s.old").write_text("mine")
    heavy(history, 2).save(tmp_path / "s")
    assert sorted(os.listdir(tmp_path)) == sorted(["s", "s.old", "s.tmpfiles", theirs.name])
